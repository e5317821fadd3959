"""Which rows of what was gathered from all ranks are which segments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longspan.comm.groups import kept
from longspan.layout import SequenceLayout, group_of


def gathered_rows(layout: SequenceLayout) -> list[int]:
    """For each segment in global order, its row in what a collective gathers by rank, ``[P · num_segments, ...]``."""

    def find() -> list[int]:
        return [segment.rank * layout.num_segments + segment.slot for segment in layout.all_segments]

    return layout.cached("gathered rows", find)


def reorder_rows(rows: Tensor, order: Sequence[int], layout: SequenceLayout) -> Tensor:
    """``rows[order]`` along the first dimension.

    The rows themselves, not a copy, where the order is the one they are in. The index is made on the device once per process group,
    and not once per batch, because copying it there makes the host wait.
    """
    order = tuple(order)
    if order == tuple(range(rows.shape[0])):
        return rows
    index = kept(group_of(layout), ("rows", order, rows.device), lambda: torch.tensor(order).to(rows.device))
    return rows[index]
