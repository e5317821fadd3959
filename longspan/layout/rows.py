"""Rows of a tensor by number. An index is made once for a layout and device: copying a list there would make the host wait."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longspan.layout.sequence_layout import SequenceLayout


def index_of(numbers: Sequence[int], device: torch.device) -> Tensor:
    """`numbers` as an index on `device`, int64."""
    return torch.tensor(numbers, dtype=torch.int64).to(device)


def index_on(layout: SequenceLayout, numbers: Sequence[int], device: torch.device) -> Tensor:
    """`index_of`, made once for the layout."""
    numbers = tuple(numbers)
    return layout.on_device(("index", numbers), device, lambda: torch.tensor(numbers, dtype=torch.int64))


def select_rows(x: Tensor, rows: Sequence[int], layout: SequenceLayout) -> Tensor:
    """``x[rows]``: a view where they follow one another, else a copy."""
    run = _run(rows)
    return x.index_select(0, index_on(layout, rows, x.device)) if run is None else x[run]


def take_rows(x: Tensor, rows: Sequence[int], layout: SequenceLayout) -> Tensor:
    """A copy of ``x[rows]``."""
    run = _run(rows)
    return x.index_select(0, index_on(layout, rows, x.device)) if run is None else x[run].clone()


def _run(rows: Sequence[int]) -> slice | None:
    first = rows[0] if rows else 0
    return slice(first, first + len(rows)) if list(rows) == list(range(first, first + len(rows))) else None
