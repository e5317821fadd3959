"""Where packed documents start: bounds as a user gives them, of position ids that restart, and of documents that are cut.

Bounds are global cu_seqlens, ``[0, ..., seq_len]``.
"""

from __future__ import annotations

import operator
from bisect import bisect_left, bisect_right
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from longspan.checks import check_tensor, described
from longspan.errors import LayoutError
from longspan.tracing import has_no_values


def check_documents(documents: Any, seq_len: int, num_ranks: int) -> tuple[int, ...] | None:
    """The bounds of `documents` as a user gives them, or None; raises LayoutError for what are none of `seq_len` tokens."""
    if documents is None:
        return None
    if isinstance(documents, Tensor):
        if hasattr(type(documents), "to_local"):
            raise LayoutError(
                f"documents must be a list or a plain tensor; got {described(documents)}. Pass the same list on every rank"
            )
        if documents.dim() != 1 or documents.dtype.is_floating_point or documents.dtype == torch.bool:
            raise LayoutError(
                "documents must be a one-dimensional integer tensor of global cu_seqlens; "
                f"got {documents.dtype} of shape {tuple(documents.shape)}"
            )
        documents = documents.tolist()
    try:
        documents = tuple(documents)
        if any(isinstance(bound, bool) for bound in documents):
            raise TypeError
        # Not int(), which would cut off what stands behind the point.
        bounds = tuple(operator.index(bound) for bound in documents)
    except TypeError:
        raise LayoutError(
            f"documents must be global cu_seqlens, ints [0, ..., {seq_len}]; got {shortened(documents)} "
            f"({type(documents).__name__}). Round what is not whole, and give one list for all documents"
        ) from None
    if len(bounds) < 2 or bounds[0] != 0:
        raise LayoutError(f"documents must be global cu_seqlens [0, ..., {seq_len}]; got {shortened(list(bounds))}")
    for number, (left, right) in enumerate(pairwise(bounds), 1):
        if right <= left:
            raise LayoutError(
                f"documents must be strictly increasing; entry {number} is {right} after {left}. Sort them, and leave out "
                "documents of no tokens"
            )
    if bounds[-1] != seq_len:
        hint = (
            f" It ends at seq_len / {num_ranks}: these look like one rank's local cu_seqlens; give the global ones"
            if num_ranks > 1 and bounds[-1] in (seq_len // num_ranks, -(-seq_len // num_ranks))
            else ""
        )
        raise LayoutError(f"documents must end at seq_len {seq_len}; they end at {bounds[-1]}.{hint}")
    return bounds


def bounds_of_positions(position_ids: Tensor) -> tuple[int, ...]:
    """The bounds of the documents of flattened position ids ``[T]`` or ``[B, T]``; each row starts one. One host read.

    Raises:
        InputError, LayoutError: as `SequenceLayout.from_positions`.
    """
    check_tensor("from_positions()", "position_ids", position_ids)
    is_integer = not (position_ids.is_floating_point() or position_ids.is_complex() or position_ids.dtype == torch.bool)
    if position_ids.dim() not in (1, 2) or not is_integer:
        hint = (
            " With one set of positions per axis, as in M-RoPE, pass those of the text"
            if position_ids.dim() == 3
            else ""
        )
        raise LayoutError(
            f"from_positions() takes integer position ids [B, T] or [T]; got {described(position_ids)}.{hint or ' Convert them'}"
        )
    if position_ids.numel() == 0:
        raise LayoutError(
            f"from_positions() needs at least one token; got position ids of shape {tuple(position_ids.shape)}. Leave the "
            "batch out"
        )
    if has_no_values(position_ids):
        raise LayoutError(
            f"from_positions() reads the values of position ids; got {described(position_ids)}, which has none. Build the layout "
            "before the compiled call, or of plain tensors"
        )
    rows = position_ids.reshape(-1, position_ids.shape[-1])
    starts = rows == 0
    starts[:, 1:] |= rows[:, 1:] != rows[:, :-1] + 1
    starts[:, 0] = True
    return (*starts.flatten().cpu().nonzero().flatten().tolist(), rows.numel())


def cut_bounds(bounds: tuple[int, ...], size: int, before: int = 0) -> tuple[int, ...]:
    """The bounds of documents that are cut at multiples of `size` tokens from their start.

    before: how many tokens of the first document stand before its first one here.
    """
    cuts: list[int] = [0, *range(size - before % size, bounds[1], size)]
    for start, stop in pairwise(bounds[1:]):
        cuts += range(start, stop, size)
    return (*cuts, bounds[-1])


def documents_within(bounds: tuple[int, ...], start: int, stop: int) -> tuple[tuple[int, ...], int]:
    """The bounds of the documents of the tokens [start, stop), counted from there, and how many of the first stand before them."""
    first, last = bisect_right(bounds, start), bisect_left(bounds, stop)
    return (0, *(bound - start for bound in bounds[first:last]), stop - start), start - bounds[first - 1]


def check_continues(continues: Any) -> int | None:
    """`continues`; raises LayoutError unless it is None or an int of at least 0."""
    # A compiler may hold it as a symbol.
    is_int = isinstance(continues, int | torch.SymInt) and not isinstance(continues, bool)
    if continues is None or (is_int and continues >= 0):
        found: int | None = continues
        return found
    raise LayoutError(
        f"continues must be None or an int of at least 0, how many tokens of the first document stand before these; got "
        f"{described(continues)}. Leave it out for a sequence by itself"
    )


def shortened(value: Any) -> str:
    """A value as an error shows it, in at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
