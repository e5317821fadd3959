"""A long convolution with a sum of exponentials over ranks: what passes between them is its state.

    write        what chunks write, their states from zero -> U of each segment
    start        U, A -> the exchange under way
    inside       what tokens read of their chunks
    wait         -> the state that enters each segment
    read         what tokens read of the states before their chunks, what arrived included

A segment of m tokens multiplies the state by e^{m a}, which every rank computes from the layout (`LengthDecay`): the state alone
is sent. The rows of a batch are columns of one state, since all have the same A. Through what a segment passes on, e^{m a} S_in,
the exchange has a gradient for a: it takes λ, the gradient of what leaves the segment, which comes back to where it was started.

Shapes: B batch rows, T tokens of this rank, C channels, N exponentials of a channel, D documents, n segments of this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longspan.attention.linear import profiled
from longspan.attention.long_convolution.kernels import ExponentialKernel
from longspan.attention.one_state import state_of_last
from longspan.attention.together import Together
from longspan.dtypes import accumulation_dtype
from longspan.exchange import Exchanger, PendingExchange, start_exchange
from longspan.exchange.all_reduce import JoinSum, sum_over_ranks
from longspan.first_order import first_order
from longspan.layout import SequenceLayout
from longspan.layout.rows import index_on, take_rows
from longspan.ops.long_convolution.exponentials import (
    chunk_plan,
    continuing_pieces,
    in_chunks,
    in_rows,
    powers,
    read_inside,
    read_states,
    scan,
    with_incoming,
    written,
)
from longspan.state import LengthDecay, Pair
from longspan.tracing import unseen_by_checkpointing


def exponents(kernel: ExponentialKernel, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """log_decay and coefficients in the dtype of the state beside inputs of `dtype`."""
    real = accumulation_dtype(dtype)
    wanted = torch.promote_types(real, torch.complex64) if kernel.log_decay.is_complex() else real
    return kernel.log_decay.to(wanted), kernel.coefficients.to(wanted)


@unseen_by_checkpointing
def convolve_exponentials(
    x: Tensor,
    kernel: ExponentialKernel,
    initial_state: Tensor | None,
    layout: SequenceLayout,
    exchange: Exchanger,
    output_final_state: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """`long_conv1d` with exponentials, whose arguments have been checked."""
    a, c = exponents(kernel, x.dtype)
    plan = chunk_plan(layout, x.device)
    over_ranks = layout.num_ranks > 1
    with profiled("longspan.long_conv1d", x):
        chunks, short = in_chunks(x, plan)
        states, ends = scan(written(chunks, short, x.shape[0], a, plan), _start_states(initial_state, layout), a, plan)
        link = _Passing(_passing(a, layout.own_segments, layout)) if over_ranks else None
        pending = None if link is None else _start(ends, a, layout, exchange, link)
        found = read_inside(chunks, a, c, plan)
        joins = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, a, c))
        incoming = None if pending is None or link is None else _incoming(pending, a, joins, link)
        if incoming is not None:
            states = with_incoming(states, incoming, a, plan)
        found = found.add_(read_states(states, a, c, plan))
        y = in_rows(found, x.shape[0], plan).to(x.dtype)
        if not output_final_state:
            return y
        final_state = _final_states(ends, incoming, a, layout, joins=y.requires_grad)
    return Together.apply(y, final_state) if over_ranks else (y, final_state)


def _start_states(initial_state: Tensor | None, layout: SequenceLayout) -> Tensor | None:
    """Rows of the initial state for the pieces of this rank that start a document, ``[pieces, B, C, N]``."""
    if initial_state is None:
        return None
    by_document = initial_state.unsqueeze(1) if layout.is_packed else initial_state.unsqueeze(0)
    return take_rows(by_document, [piece.document for piece in layout.pieces if piece.starts_document], layout)


@dataclass
class _Passing:
    """What the two nodes around an exchange hand to each other.

    transition: of this rank's segments. incoming: the state that entered them, ``[n, 1, C, N, B]``; 2 N numbers of complex ones.
    """

    transition: LengthDecay
    incoming: Tensor | None = None


class _Leaving(torch.autograd.Function):
    """What leaves segments, for the exponents: U is passed on to the exchange.

    | | shape | |
    |---|---|---|
    | state | [n, 1, C, N, B] | U, returned as it is; 2 N numbers where a is complex |
    | a | [C, N] | |

    Backward: dU = λ; da = Σ m · conj(e^{m a} S_in) ⊙ λ over segments of m tokens and rows.
    """

    @staticmethod
    def forward(ctx: Any, state: Tensor, a: Tensor, link: _Passing) -> Tensor:
        ctx.link, ctx.dtype = link, a.dtype
        return state.view_as(state)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (grad,) = grads
        link: _Passing = ctx.link
        if not ctx.needs_input_grad[1]:
            return grad, None, None
        assert link.incoming is not None
        transition = link.transition
        # Nothing passes a segment in which a document starts, however many tokens it has.
        lengths = transition.parameter.masked_fill(transition.parameter == torch.inf, 0.0).view(-1, 1, 1)
        found = transition.of_numbers(grad, link.incoming).squeeze(1)
        link.incoming = None
        return grad, (lengths * transition.factor().conj() * found).sum(0).to(ctx.dtype), None


class _Entered(torch.autograd.Function):
    """Hands what entered the segments to the node before the exchange, in backward; incoming ``[n, 1, C, N, B]`` is returned."""

    @staticmethod
    def forward(ctx: Any, incoming: Tensor, link: _Passing) -> Tensor:
        ctx.link = link
        ctx.save_for_backward(incoming)
        return incoming.view_as(incoming)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (ctx.link.incoming,) = ctx.saved_tensors
        return grads[0], None


def _passing(a: Tensor, segments: Sequence[int], layout: SequenceLayout) -> LengthDecay:
    """The transitions of some of the layout's segments, by their numbers in global order; zero where a document starts."""
    of_layout = [layout.all_segments[number] for number in segments]
    lengths = index_on(layout, [segment.num_tokens for segment in of_layout], a.device).to(torch.float64)
    rates = a.detach().to(torch.complex128 if a.is_complex() else torch.float64)
    return LengthDecay(lengths, rates).cut([segment.starts_document for segment in of_layout])


def _start(ends: Tensor, a: Tensor, layout: SequenceLayout, exchange: Exchanger, link: _Passing) -> PendingExchange:
    """Launch the exchange of this rank's segments' pairs."""
    last_of_segment: list[int | None] = [None] * layout.num_segments
    for number, piece in enumerate(layout.pieces):
        last_of_segment[piece.segment] = number
    # A segment without tokens writes nothing.
    rows = [ends[number] if number is not None else torch.zeros_like(ends[0]) for number in last_of_segment]
    state = torch.stack(rows)
    if a.is_complex():
        state = torch.cat([state.real, state.imag], dim=-1)
    state = state.permute(0, 2, 3, 1).unsqueeze(1).contiguous()
    transition = _passing(a, range(len(layout.all_segments)), layout)
    return start_exchange(exchange, Pair(transition, _Leaving.apply(state, a, link)), layout)


def _incoming(pending: PendingExchange, a: Tensor, joins: bool, link: _Passing) -> Tensor:
    """The state that enters each segment, ``[n, B, C, N]``."""
    arrived: Tensor = _Entered.apply(pending.wait(joins), link)
    states = arrived.squeeze(1).permute(0, 3, 1, 2)
    return torch.complex(*states.chunk(2, dim=-1)) if a.is_complex() else states


def _final_states(ends: Tensor, incoming: Tensor | None, a: Tensor, layout: SequenceLayout, joins: bool) -> Tensor:
    """The state after the last token, ``[B, C, N]``, or of each document, ``[D, C, N]``, on every rank."""
    pieces, continuing = layout.pieces, continuing_pieces(layout)
    final = [number for number, piece in enumerate(pieces) if piece.ends_document]
    states = take_rows(ends, final, layout)
    if incoming is not None:
        entered = [(row, number) for row, number in enumerate(final) if number in continuing]
        if entered:
            rows = index_on(layout, [row for row, _ in entered], a.device)
            counts = index_on(layout, [pieces[number].num_tokens for _, number in entered], a.device)
            factors = powers(a, counts).transpose(0, 1).unsqueeze(1)
            segments = [continuing[number] for _, number in entered]
            states = states.index_add(0, rows, factors * take_rows(incoming, segments, layout))
        documents = index_on(layout, [pieces[number].document for number in final], a.device)
        everyone = states.new_zeros(layout.num_documents, *states.shape[1:]).index_copy(0, documents, states)
        numbers = torch.view_as_real(everyone) if a.is_complex() else everyone
        numbers = sum_over_ranks(numbers, layout)
        if joins and not numbers.requires_grad:
            numbers = JoinSum.apply(numbers, numbers.new_zeros((), requires_grad=True), layout)
        states = torch.view_as_complex(numbers) if a.is_complex() else numbers
    return state_of_last(states.squeeze(1), layout) if layout.is_packed else states.squeeze(0)
