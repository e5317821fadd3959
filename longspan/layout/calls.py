"""What operators ask of the layout of a call: whether it fits, whether a compiler may follow, and one where there is none."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor

from longspan.checks import described
from longspan.errors import InputError
from longspan.layout.sequence_layout import SequenceLayout
from longspan.tracing import breaks_graphs


@lru_cache(maxsize=8)
def _kept_for_one_device(seq_len: int, documents: tuple[int, ...] | None) -> SequenceLayout:
    return SequenceLayout.local(seq_len, documents)


def layout_of_one_device(seq_len: int, documents: tuple[int, ...] | None = None) -> SequenceLayout:
    """The layout of a call without one, with what calls of the same length and documents have built of it already."""
    # A compiled call builds it once, as it is compiled.
    if torch.compiler.is_compiling() or type(seq_len) is not int:
        return SequenceLayout.local(seq_len, documents)
    return _kept_for_one_device(seq_len, documents)


def stops_graphs(layout: object) -> bool:
    """Whether `torch.compile` traces a call over several ranks, which it is to make between two graphs."""
    return breaks_graphs() and isinstance(layout, SequenceLayout) and layout.num_ranks > 1


def check_layout(layout: object, length: int, what: str, sends: bool = True) -> None:
    """Raise unless `layout` is one whose process group exists and that gives this rank `length` tokens; `what` names the caller.

    sends: whether the call needs the process group; shapes alone do not.

    Raises:
        InputError: for what is no layout. LayoutError: for another number of tokens, or a group that is not there.
    """
    if not isinstance(layout, SequenceLayout):
        raise InputError(
            f"{what}: layout must be a SequenceLayout or None; got {described(layout)}. Build one as "
            "SequenceLayout(seq_len, group)"
        )
    layout.check_local_length(length, what)
    if sends:
        layout.check_group(what)


def check_packed(name: str, x: Tensor, layout: SequenceLayout) -> None:
    """Raise InputError where a layout has documents and x ``[B, T, ...]`` more than one row."""
    if layout.is_packed and x.shape[0] != 1:
        raise InputError(
            f"{name}: with documents the batch has one row, B = 1, the packed sequence; got B = {x.shape[0]}. Lay the rows one "
            "after another, with their bounds among the layout's documents"
        )


def check_whole(name: str, layout: SequenceLayout) -> None:
    """Raise InputError where a layout is a stretch of a sequence, for what reads the tokens of a whole document."""
    if layout.continues is not None:
        raise InputError(
            f"{name}: with causal=False a token reads all of its document, and of a stretch of a sequence the tokens before and "
            f"behind it are elsewhere; got a layout with continues={layout.continues}. Take the sequence in one call, or "
            "causal=True; a layout whose documents are all whole here is one without continues"
        )


def group_of(layout: SequenceLayout) -> dist.ProcessGroup:
    """The process group of a layout of two ranks or more."""
    assert layout.group is not None and layout.num_ranks > 1
    return layout.group
