"""A long convolution with a sum of exponentials over ranks: what passes between them is its state.

    write        what chunks write, their states from zero -> U of each segment
    start        U, A -> the exchange under way
    inside       what tokens read of their chunks
    wait         -> the state that enters each segment
    read         what tokens read of the states before their chunks, what arrived included

A segment of m tokens multiplies the state by e^{m a}: `ChannelDecay` for real exponents, and for complex ones `Dense` with a
rotation of two rows for each. The rows of a batch are columns of one state, since all have the same A: it is sent once.

Shapes: B batch rows, T tokens of this rank, C channels, N exponentials of a channel, D documents, n segments of this rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.attention.linear import profiled
from longspan.attention.long_convolution.kernels import ExponentialKernel
from longspan.attention.one_state import state_of_last
from longspan.attention.together import Together
from longspan.dtypes import accumulation_dtype
from longspan.exchange import Exchanger, PendingExchange, start_exchange
from longspan.exchange.all_reduce import JoinSum, sum_over_ranks
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
    written,
)
from longspan.state import ChannelDecay, Dense, Pair, Transition
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
        pending = _start(ends, a, layout, exchange) if over_ranks else None
        found = read_inside(chunks, a, c, plan)
        incoming = None if pending is None else _incoming(pending, x, a, c)
        found = found.add_(read_states(states, incoming, a, c, plan))
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


def _start(ends: Tensor, a: Tensor, layout: SequenceLayout, exchange: Exchanger) -> PendingExchange:
    """Launch the exchange of this rank's segments' pairs."""
    last_of_segment: list[int | None] = [None] * layout.num_segments
    for number, piece in enumerate(layout.pieces):
        last_of_segment[piece.segment] = number
    # A segment without tokens writes nothing.
    rows = [ends[number] if number is not None else torch.zeros_like(ends[0]) for number in last_of_segment]
    state = torch.stack(rows)
    counts = index_on(layout, [stop - start for start, stop in layout.segments], a.device)
    transition: Transition
    if a.is_complex():
        factor = powers(a, counts).movedim(-2, 0).flatten(1)
        rotation = torch.stack([factor.real, -factor.imag, factor.imag, factor.real], dim=-1).unflatten(-1, (2, 2))
        transition = Dense(rotation.unsqueeze(1))
        state = torch.view_as_real(state.flatten(2)).permute(0, 2, 3, 1).unsqueeze(1)
    else:
        transition = ChannelDecay((a * counts.view(-1, 1, 1).to(a.dtype)).unsqueeze(1))
        state = state.permute(0, 2, 3, 1).unsqueeze(1)
    cut = [layout.all_segments[number].starts_document for number in layout.own_segments]
    return start_exchange(exchange, Pair(transition.cut(cut), state.contiguous()), layout)


def _incoming(pending: PendingExchange, x: Tensor, a: Tensor, c: Tensor) -> Tensor:
    """The state that enters each segment, ``[n, B, C, N]``."""
    joins = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, a, c))
    arrived = pending.wait(joins).squeeze(1)
    if not a.is_complex():
        return arrived.permute(0, 3, 1, 2)
    return torch.view_as_complex(arrived.permute(0, 3, 1, 2).contiguous()).unflatten(2, tuple(a.shape))


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
