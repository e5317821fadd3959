"""Whether the ranks of a layout's group are there, and all of them have the same layout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from longspan.errors import LayoutError
from longspan.layout.documents import shortened

if TYPE_CHECKING:
    from longspan.layout.sequence_layout import SequenceLayout

_COMPARED = ("seq_len", "order", "documents", "ranks_per_node", "weights", "continues", "rank_order")


def check_group(layout: SequenceLayout, what: str) -> None:
    """See `SequenceLayout.check_group`."""
    if layout.num_ranks == 1 or (layout.group is not None and torch.compiler.is_compiling()):
        return
    if layout.group is None:
        raise LayoutError(
            f"{what} needs a layout with a process group; got one made by for_rank() for rank {layout.rank} of "
            f"{layout.num_ranks}, for planning. Build it as SequenceLayout(seq_len, group)"
        )
    try:
        dist.get_rank(layout.group)
    except (KeyError, ValueError, RuntimeError):
        raise LayoutError(
            f"{what} was given a layout over a process group of {layout.num_ranks} ranks that no longer exists: it was made "
            "before destroy_process_group(). Build a new SequenceLayout with a group of today"
        ) from None


def verify(layout: SequenceLayout) -> None:
    """See `SequenceLayout.verify`."""
    if layout.num_ranks == 1 or layout.group is None:
        return
    check_group(layout, "verify()")
    mine = {name: getattr(layout, name) for name in _COMPARED}
    everyone: list[Any] = [None] * layout.num_ranks
    dist.all_gather_object(everyone, mine, group=layout.group)
    rows = [
        f"{key}: " + ", ".join(f"rank {rank} has {shortened(other[key])}" for rank, other in enumerate(everyone))
        for key in mine
        if any(other[key] != mine[key] for other in everyone)
    ]
    if rows:
        raise LayoutError("the ranks disagree on the layout: " + "; ".join(rows))
