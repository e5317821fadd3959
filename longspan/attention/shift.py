"""The token before each, along a sequence whose tokens are split over ranks: `token_shift`.

Shapes: B batch rows, T this rank's tokens (all tokens without a layout), C channels, D documents. The nodes are those of
`longspan.attention.convolution`, with a halo of one token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor

from longspan.attention.convolution import before_heads, check_initial_state, check_tokens, final_tokens
from longspan.attention.one_state import state_of_last, states_of_documents
from longspan.attention.opaque import SHIFT, bounds_of
from longspan.attention.together import Together
from longspan.checks import check_flag
from longspan.exchange.halo import halo_plan, start_halo
from longspan.first_order import first_order
from longspan.layout import SequenceLayout
from longspan.layout.calls import stops_graphs
from longspan.layout.rows import index_of
from longspan.ops.convolution import PlaceRows, kept_heads
from longspan.tracing import has_no_values, outside_graphs, unseen_by_checkpointing


@overload
def token_shift(
    x: Tensor, *, initial_state: Tensor | None = ..., output_final_state: Literal[False] = ..., layout: SequenceLayout | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def token_shift(
    x: Tensor, *, initial_state: Tensor | None = ..., output_final_state: Literal[True], layout: SequenceLayout | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def token_shift(
    x: Tensor, *, initial_state: Tensor | None = ..., output_final_state: bool, layout: SequenceLayout | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def token_shift(
    x: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    layout: SequenceLayout | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The token before each: ``y_t = x_{t-1}``; at a document's start the initial state, or zero.

    Args:
        x: ``[B, T, C]``, float64, float32 or bfloat16; T is this rank's number of tokens, or the whole length without a layout.
        initial_state: the token before the first global one, ``[B, C]``, or before each document, ``[num_documents, C]`` (one for
            all where the layout `continues` a sequence); the dtype of x; the same on every rank, its gradient a rank's share. None
            is zeros.
        output_final_state: also return the last token (of each document) on every rank: the initial state of what follows.
        layout: which tokens this rank holds, and the documents; None is one device and one document. With documents, B is 1.

    Returns:
        ``[B, T, C]`` in the dtype of x; with `output_final_state`, the pair (y, final_state), final_state shaped like
        `initial_state`. Its gradient is the sum of what every rank sends back. Ranks may let y, the final state or both enter their
        losses.

    Every rank must take the same calls in the same order, backward too.

    Raises:
        InputError, LayoutError: as `causal_conv1d`.
    """
    if stops_graphs(layout):
        return _shift_outside_graphs(
            x, initial_state=initial_state, output_final_state=output_final_state, layout=layout
        )
    layout = check_tokens(x, layout, "token_shift")
    check_flag("token_shift", "output_final_state", output_final_state)
    check_initial_state("token_shift", initial_state, x, (), "the token before", layout)
    initial_state = states_of_documents(initial_state, layout)
    if has_no_values(x):
        y, final_state = SHIFT(x, initial_state, bounds_of(layout, x), output_final_state)
        final_state = state_of_last(final_state, layout) if output_final_state else final_state
    else:
        y, final_state = _shift_over_ranks(x, initial_state, layout, output_final_state)
    return (y, final_state) if output_final_state else y


_shift_outside_graphs = outside_graphs(token_shift)


@unseen_by_checkpointing
def _shift_over_ranks(
    x: Tensor, initial_state: Tensor | None, layout: SequenceLayout, output_final_state: bool
) -> tuple[Tensor, Tensor | None]:
    plan = _shift_plan(layout, x.device)
    states = None if initial_state is None else initial_state.unsqueeze(1)
    pending = None
    if not halo_plan(layout, 1).is_empty:
        joins = torch.is_grad_enabled() and initial_state is not None and initial_state.requires_grad
        pending = start_halo(x, layout, 1, adds_in_place=True, joins=joins)
    y: Tensor = _Shift.apply(x if pending is None else pending.x, plan)
    halo = None if pending is None else pending.wait()
    if halo is not None or states is not None:
        heads = kept_heads(layout, 1, states is not None, x.device)
        first = before_heads(halo, states, heads, layout).index_select(0, heads.head)
        y = PlaceRows.apply(y, first.squeeze(2).transpose(0, 1), heads.rows)
    if not output_final_state:
        return y, None
    final_state = state_of_last(final_tokens(x, states, layout, 1, joins=y.requires_grad), layout).squeeze(1)
    return Together.apply(y, final_state) if layout.num_ranks > 1 else (y, final_state)


@dataclass(frozen=True)
class _ShiftPlan:
    """Local rows of the first and last token of each piece."""

    starts: Tensor
    ends: Tensor


def _shift_plan(layout: SequenceLayout, device: torch.device) -> _ShiftPlan:
    def build() -> _ShiftPlan:
        return _ShiftPlan(
            starts=index_of([piece.start for piece in layout.pieces], device),
            ends=index_of([piece.stop - 1 for piece in layout.pieces], device),
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
