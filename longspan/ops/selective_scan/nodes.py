"""The nodes of autograd of a selective scan: one where nothing is exchanged, or write and read around an exchange.

    write     inputs, start states     -> the states that leave segments, a ticket
    (start, wait: longspan/exchange)   -> the states that enter segments
    read      ticket, those states     -> outputs, final states

Backward, read finds the gradients of the states that entered, and nothing else. What it was given goes on to write's backward,
which runs when the gradients of the states that left have come back from other ranks: there all gradients are found in one pass,
each token's from the true state before it and the whole gradient of the state behind it. So none of them has a term of its own
for what crosses ranks, and the exchange need not differentiate its transitions.

Shapes: as in `longspan.ops.selective_scan`; states ``[B, N, E]``, stacked along a first dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longspan.first_order import first_order
from longspan.ops.selective_scan.block import ScanInputs
from longspan.ops.selective_scan.passes import (
    ScanCall,
    ScanGradients,
    backward_pass,
    end_states,
    entering_adjoint,
    forward_pass,
)

Pieces = tuple[int, ...]


def _of_pieces(pieces: Sequence[int], states: Tensor | None) -> dict[int, Tensor]:
    """Stacked states by the pieces that they belong to."""
    return {} if states is None else dict(zip(pieces, states.unbind(0), strict=True))


def _starting(call: ScanCall) -> Pieces:
    """The pieces that start a document."""
    return tuple(number for number, piece in enumerate(call.layout.pieces) if piece.starts_document)


def _grad_of_start(call: ScanCall, grads: ScanGradients, start_states: Tensor | None) -> Tensor | None:
    if start_states is None:
        return None
    rows = [grads.entering[piece] for piece in _starting(call)]
    return torch.stack(rows) if rows else torch.zeros_like(start_states)


class ScanAlone(torch.autograd.Function):
    """The whole scan, where nothing enters from elsewhere.

    | | shape | |
    |---|---|---|
    | start_states | [num_starting_pieces, B, N, E] or None | of the pieces that start a document |
    | inputs | see `ScanInputs` | |
    | o | [B, T, E] | |
    | final | [len(final_pieces), B, N, E] | the states that leave these pieces |

    Forward and backward: `forward_pass` and `backward_pass`.
    """

    @staticmethod
    def forward(
        ctx: Any, call: ScanCall, final_pieces: Pieces, start_states: Tensor | None, *inputs: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        given = ScanInputs(*inputs)  # type: ignore[arg-type]
        out, between, final = forward_pass(call, given, _of_pieces(_starting(call), start_states), final_pieces)
        ctx.call, ctx.final_pieces = call, final_pieces
        ctx.save_for_backward(start_states, between, *given)
        ctx.set_materialize_grads(False)
        return out, final

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_out, grad_final = grads
        call: ScanCall = ctx.call
        start_states, between, *inputs = ctx.saved_tensors
        given = ScanInputs(*inputs)
        entering, leaving = _of_pieces(_starting(call), start_states), _of_pieces(ctx.final_pieces, grad_final)
        found = backward_pass(call, given, entering, between, grad_out, leaving)
        return None, None, _grad_of_start(call, found, start_states), *found.of(given)


@dataclass
class _Reading:
    """What read's backward hands to write's: gradients, the states that entered segments, and those between chunks."""

    grad_out: Tensor | None
    grad_final: Tensor | None
    final_pieces: Pieces
    incoming: Tensor
    between: Tensor


@dataclass
class ScanLink:
    """What the nodes of one call share.

    sent: for each piece whose state is sent, the segment that it leaves. received: for each segment that receives a state, the
    piece that it enters.
    """

    call: ScanCall
    sent: dict[int, int]
    received: dict[int, int]
    reading: _Reading | None = None

    def entering(self, start_states: Tensor | None, incoming: Tensor | None = None) -> dict[int, Tensor]:
        """The states that enter pieces: of documents' starts, and ``incoming [num_segments, B, N, E]``."""
        states = _of_pieces(_starting(self.call), start_states)
        if incoming is not None:
            states |= {piece: incoming[segment] for segment, piece in self.received.items()}
        return states


class ScanWrite(torch.autograd.Function):
    """What other ranks wait for: the states that leave segments, each piece from zero or its document's start state.

    | | shape | |
    |---|---|---|
    | start_states | [num_starting_pieces, B, N, E] or None | |
    | inputs | see `ScanInputs` | |
    | ends | [num_segments, B, N, E] | zero for a segment whose state is not sent |
    | sums | [num_segments, B, E] | of their steps Δ, as `end_states` has them; takes no gradient: see the module's page |
    | ticket | [] | ties read to this node; carries no value |

    Backward: all gradients, by `backward_pass`, from those of `ends` and what read's backward has left in the link.
    """

    @staticmethod
    def forward(
        ctx: Any, link: ScanLink, start_states: Tensor | None, *inputs: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        given = ScanInputs(*inputs)  # type: ignore[arg-type]
        num_segments = link.call.layout.num_segments
        ends, sums = end_states(link.call, given, link.entering(start_states), link.sent, num_segments)
        ctx.link = link
        ctx.save_for_backward(start_states, *given)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(sums)
        return ends, sums, ends.new_zeros(())

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        link: ScanLink = ctx.link
        start_states, *inputs = ctx.saved_tensors
        given, reading, call = ScanInputs(*inputs), link.reading, link.call
        assert reading is not None
        link.reading = None
        leaving = _of_pieces(reading.final_pieces, reading.grad_final)
        if grads[0] is not None:
            for piece, segment in link.sent.items():
                grad = grads[0][segment]
                leaving[piece] = leaving[piece] + grad if piece in leaving else grad
        entering = link.entering(start_states, reading.incoming)
        found = backward_pass(call, given, entering, reading.between, reading.grad_out, leaving)
        return None, _grad_of_start(call, found, start_states), *found.of(given)


class ScanRead(torch.autograd.Function):
    """What the tokens read, from the states that truly enter this rank's segments.

    | | shape | |
    |---|---|---|
    | ticket | [] | of the write node |
    | incoming | [num_segments, B, N, E] | |
    | start_states, inputs | as the write node had them | without gradients: that node finds them |
    | o | [B, T, E] | |
    | final | [len(final_pieces), B, N, E] | the states that leave these pieces |

    Backward: ∂incoming, by `entering_adjoint`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        link: ScanLink,
        final_pieces: Pieces,
        ticket: Tensor,
        incoming: Tensor,
        start_states: Tensor | None,
        *inputs: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        given = ScanInputs(*inputs)  # type: ignore[arg-type]
        out, between, final = forward_pass(link.call, given, link.entering(start_states, incoming), final_pieces)
        ctx.link, ctx.final_pieces = link, final_pieces
        ctx.save_for_backward(incoming, between, *given)
        ctx.set_materialize_grads(False)
        return out, final

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_out, grad_final = grads
        link: ScanLink = ctx.link
        incoming, between, *inputs = ctx.saved_tensors
        link.reading = _Reading(grad_out, grad_final, ctx.final_pieces, incoming, between)
        pieces = tuple(sorted(link.received.values()))
        leaving = _of_pieces(ctx.final_pieces, grad_final)
        found = entering_adjoint(link.call, ScanInputs(*inputs), pieces, grad_out, leaving)
        grad_incoming = torch.zeros_like(incoming)
        for segment, piece in link.received.items():
            grad_incoming[segment] = found[piece]
        ticket = incoming.new_zeros(())
        return None, None, ticket, grad_incoming, *(None for _ in range(1 + len(inputs)))
