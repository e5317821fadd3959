"""The token before each, along a sequence whose tokens are split over ranks: `token_shift`.

Shapes: B batch rows, T this rank's tokens (all tokens without a layout), C channels. The nodes are those of
`longspan.attention.convolution`, with a halo of one token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longspan.attention.convolution import PlaceRows, check_tokens, heads_of, index_of
from longspan.attention.opaque import SHIFT, bounds_of
from longspan.exchange.halo import halo_plan, start_halo
from longspan.first_order import first_order
from longspan.layout import SequenceLayout
from longspan.layout.sequence_layout import stops_graphs
from longspan.tracing import has_no_values, outside_graphs, unseen_by_checkpointing


def token_shift(x: Tensor, layout: SequenceLayout | None = None) -> Tensor:
    """The token before each: ``y_t = x_{t-1}``, zero at a document's start.

    Args:
        x: ``[B, T, C]``, float64, float32 or bfloat16; T is this rank's number of tokens, or the whole length without a layout.
        layout: which tokens this rank holds, and the documents; None is one device and one document. With documents, B is 1.

    Returns:
        ``[B, T, C]`` in the dtype of x. Every rank must take the same calls in the same order, backward too.

    Raises:
        InputError, LayoutError: as `causal_conv1d`.
    """
    if stops_graphs(layout):
        return _shift_outside_graphs(x, layout)
    layout = check_tokens(x, layout, "token_shift")
    if has_no_values(x):
        y: Tensor = SHIFT(x, bounds_of(layout, x))
        return y
    return _shift(x, layout)


_shift_outside_graphs = outside_graphs(token_shift)


@unseen_by_checkpointing
def _shift(x: Tensor, layout: SequenceLayout) -> Tensor:
    plan = _shift_plan(layout, x.device)
    if halo_plan(layout, 1).is_empty:
        shifted: Tensor = _Shift.apply(x, plan)
        return shifted
    pending = start_halo(x, layout, 1, adds_in_place=True)
    y = _Shift.apply(pending.x, plan)
    first = pending.wait().index_select(0, plan.head_segments)
    placed: Tensor = PlaceRows.apply(y, first.squeeze(2).transpose(0, 1), plan.head_rows)
    return placed


@dataclass(frozen=True)
class _ShiftPlan:
    """Local rows of the first and last token of each piece; segments whose first token continues a document, and their rows."""

    starts: Tensor
    ends: Tensor
    head_segments: Tensor
    head_rows: Tensor


def _shift_plan(layout: SequenceLayout, device: torch.device) -> _ShiftPlan:
    def build() -> _ShiftPlan:
        heads = heads_of(layout, 1, False, device)
        return _ShiftPlan(
            starts=index_of([piece.start for piece in layout.pieces], device),
            ends=index_of([piece.stop - 1 for piece in layout.pieces], device),
            head_segments=heads.segments,
            head_rows=heads.rows,
        )

    return layout.cached(("token_shift", device), build)


class _Shift(torch.autograd.Function):
    """The token before each inside its piece, zero at a piece's start.

    | | shape |
    |---|---|
    | x, y | [B, T, C] |

    Forward: y_t = x_{t-1}. Backward: dx_t = dy_{t+1}, zero at a piece's end: dy at a piece's start is not looked at. dx is always
    a tensor of its own, which `start_halo` relies on.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: _ShiftPlan) -> Tensor:
        ctx.plan = plan
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        y[:, 1:] = x[:, :-1]
        return y.index_fill_(1, plan.starts, 0)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None]:
        grad_x = torch.empty_like(grad_y, memory_format=torch.contiguous_format)
        grad_x[:, :-1] = grad_y[:, 1:]
        return grad_x.index_fill_(1, ctx.plan.ends, 0), None
