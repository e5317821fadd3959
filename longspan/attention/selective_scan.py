"""Mamba's selective scan over ranks: `selective_scan`.

Shapes: B batch rows, T this rank's tokens (all tokens without a layout), E channels in G groups, N numbers of a state per channel.
"""

from __future__ import annotations

from typing import Literal, Unpack, overload

import torch.nn.functional as F
from torch import Tensor

from longspan.attention.by_name import apply_operator
from longspan.attention.linear import EndRows, end_rows, gather_states, profiled, start_states_of
from longspan.attention.one_state import state_of_last, states_of_documents
from longspan.attention.opaque import SELECTIVE_SCAN, bounds_of
from longspan.attention.options import StateOptions
from longspan.attention.selective_scan_checks import (
    NAME,
    check_initial_state,
    check_signs,
    checked_inputs,
    chosen_backend,
)
from longspan.attention.together import Together
from longspan.autocast import as_in_product, without_autocast
from longspan.checks import check_count, check_flag
from longspan.dtypes import accumulation_dtype, at_least_float32
from longspan.exchange import Exchanger, exchange_named, start_exchange
from longspan.layout import SequenceLayout
from longspan.layout.calls import check_layout, check_packed, layout_of_one_device, stops_graphs
from longspan.ops.decay.form import default_chunk_size
from longspan.ops.selective_scan.block import ScanInputs
from longspan.ops.selective_scan.nodes import ScanAlone, ScanLink, ScanRead, ScanWrite
from longspan.ops.selective_scan.passes import ScanCall
from longspan.state import Pair, RateDecay
from longspan.tracing import has_no_values, outside_graphs, unseen_by_checkpointing


@overload
def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = ..., z: Tensor | None = ...,
    delta_bias: Tensor | None = ..., delta_softplus: bool = ..., *,
    output_final_state: Literal[False] = ..., **options: Unpack[StateOptions],
) -> Tensor: ...  # fmt: skip
@overload
def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = ..., z: Tensor | None = ...,
    delta_bias: Tensor | None = ..., delta_softplus: bool = ..., *,
    output_final_state: Literal[True], **options: Unpack[StateOptions],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = ..., z: Tensor | None = ...,
    delta_bias: Tensor | None = ..., delta_softplus: bool = ..., *,
    output_final_state: bool, **options: Unpack[StateOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    layout: SequenceLayout | None = None,
    exchange: str | Exchanger = "auto",
    backend: str | None = None,
    chunk_size: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba's selective scan, with the names of state-spaces/mamba (arXiv 2312.00752, Algorithm 2).

    ``h_t = e^{Δ_t A} ⊙ h_{t-1} + (Δ_t u_t) B_tᵀ``, ``y_t = h_t C_t + D ⊙ u_t``, times silu(z_t); Δ is delta, or
    ``softplus(delta + delta_bias)``. Each channel has N numbers of its own, each with a rate of its own.

    Tokens come before channels here, as everywhere in this library. state-spaces/mamba has ``[B, E, T]`` for u, delta and z, and
    ``[B, N, T]`` or ``[B, G, N, T]`` for B and C: pass ``u.transpose(1, 2)``, ``B.transpose(1, 2)`` or ``B.permute(0, 3, 1, 2)``.
    A, D, delta_bias and states are laid out as there.

    Args:
        u: ``[B, T, E]``, float64, float32 or bfloat16.
        delta: step sizes ``[B, T, E]``, at least 0; or their logits, with `delta_softplus`. Not rounded to the dtype of u.
        A: ``[E, N]``, at most 0: −e^A_log; the same on every rank.
        B, C: ``[B, T, N]``, or ``[B, T, G, N]`` with E a multiple of G, in the dtype of u. Under torch.autocast u, B and C are cast
            as the inputs of a matrix product are; everything else is not.
        D: ``[E]``, or None.
        z: gate ``[B, T, E]``, or None.
        delta_bias: ``[E]``, added to delta, or None.
        delta_softplus: take the softplus of delta (after delta_bias).
        initial_state: state before the first global token, ``[B, E, N]``, or before each document, ``[num_documents, E, N]``;
            float32 (float64 for float64); the same on every rank, its gradient a rank's share, as those of A, D and delta_bias are.
            Of a layout that `continues` a sequence there is one state, ``[B, E, N]``, before the first document.
        output_final_state: also return the state after the last global token (of each document), on every rank.
        layout, exchange: as in `longspan.linear_attention`. Ranks send states and, for each channel, the sum of its steps.
        backend: ``"torch"``, plain PyTorch operations on any device; ``"triton"``, the kernels of `longspan.gla` on NVIDIA GPUs, in
            float32 or bfloat16, which take ``[B, T, E, N]`` log decays in full. None is ``"triton"`` where it runs and takes the
            inputs, else ``"torch"``.
        chunk_size: tokens between which states are kept for backward; None is 64, and 128 in bfloat16 (``"triton"``: as
            `longspan.gla`).

    Returns:
        o ``[B, T, E]`` in the dtype of u, computed in float32 (float64) and rounded once; with `output_final_state`, the pair
        (o, final_state). The final state's gradient is the sum of what every rank sends back. Ranks may let o, the final state or
        both enter their losses.

    For backward inputs are kept, and states, N / chunk_size numbers for each channel of a token. No tensor of ``[B, T, E, N]`` is
    made (but by ``"triton"``). What is computed is the recurrence itself, so that errors are its own, and for what crosses ranks
    a sum over tokens, in which one that has decayed by e^-60 (float64: e^-600) is zero; what is NaN or infinite reaches no earlier
    output and no other document.

    Raises:
        InputError: for shapes, dtypes or options that do not fit, an A above 0, or a delta below 0 where it is no logit (looked at
            on the CPU only; A is the same on every rank, and of delta ranks tell each other, so that all of them raise).
        LayoutError: as in `longspan.linear_attention`.
    """
    if stops_graphs(layout):
        return _scan_outside_graphs(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state=initial_state,
            output_final_state=output_final_state, layout=layout, exchange=exchange, backend=backend, chunk_size=chunk_size,
        )  # fmt: skip
    exchanger = exchange_named(exchange)
    check_flag(NAME, "delta_softplus", delta_softplus)
    check_flag(NAME, "output_final_state", output_final_state)
    if chunk_size is not None:
        check_count(NAME, "chunk_size", chunk_size, "the tokens between which states are kept, or None")
    inputs = checked_inputs(ScanInputs(u, delta, A, as_in_product(B), as_in_product(C), D, z, delta_bias))
    backend = chosen_backend(inputs, backend, chunk_size)
    layout = layout_of_one_device(inputs.u.shape[1]) if layout is None else layout
    check_layout(layout, inputs.u.shape[1], NAME, sends=not has_no_values(inputs.u))
    check_packed(NAME, inputs.u, layout)
    check_initial_state(inputs, initial_state, layout)
    check_signs(inputs, delta_softplus, layout)
    if backend == "triton":
        return _by_kernels(inputs, delta_softplus, initial_state, output_final_state, layout, exchange, chunk_size)
    if has_no_values(inputs.u):
        o, final_state = SELECTIVE_SCAN(
            *inputs, states_of_documents(initial_state, layout), bounds_of(layout, inputs.u), delta_softplus,
            output_final_state, chunk_size,
        )  # fmt: skip
        return (o, state_of_last(final_state, layout)) if output_final_state else o
    return _scan(inputs, delta_softplus, initial_state, output_final_state, layout, exchanger, chunk_size)


_scan_outside_graphs = outside_graphs(selective_scan)


@unseen_by_checkpointing
def _scan(
    inputs: ScanInputs,
    delta_softplus: bool,
    initial_state: Tensor | None,
    output_final_state: bool,
    layout: SequenceLayout,
    exchange: Exchanger,
    chunk_size: int | None,
) -> Tensor | tuple[Tensor, Tensor]:
    dtype = inputs.u.dtype
    call = ScanCall(layout, chunk_size or default_chunk_size(dtype), delta_softplus, accumulation_dtype(dtype))
    ends = layout.cached(("end_rows", output_final_state), lambda: end_rows(layout, output_final_state))
    start_states = start_states_of(initial_state, layout)
    start_states = None if start_states is None else start_states.transpose(-1, -2)
    with profiled("longspan.selective_scan", inputs.u):
        if layout.num_ranks == 1:
            o, final = ScanAlone.apply(call, ends.final_pieces, start_states, *inputs)
        else:
            o, final = _scan_over_ranks(call, inputs, start_states, exchange, ends)
    if not output_final_state:
        return o
    states = final.transpose(-1, -2)
    if layout.num_ranks > 1:
        states = gather_states(states, ends.final_states, layout)
    final_state = states.squeeze(1) if layout.has_document_states else states.squeeze(0)
    return Together.apply(o, final_state) if layout.num_ranks > 1 else (o, final_state)


def _scan_over_ranks(
    call: ScanCall, inputs: ScanInputs, start_states: Tensor | None, exchange: Exchanger, ends: EndRows
) -> tuple[Tensor, Tensor]:
    """Write, exchange, read: o ``[B, T, E]``, and the states that leave documents ``[len(ends.final_pieces), B, N, E]``."""
    layout = call.layout
    pieces = layout.pieces
    received = {piece.segment: number for number, piece in enumerate(pieces) if not piece.starts_document}
    link = ScanLink(call, {number: pieces[number].segment for number in ends.sent_pieces}, received)
    written, sums, ticket = ScanWrite.apply(link, start_states, *inputs)
    transition = RateDecay(sums, inputs.A.detach().to(call.state_dtype))
    transition = transition.cut([layout.all_segments[number].starts_document for number in layout.own_segments])
    # As the exchange takes states: a head per channel, a key of N numbers, one value.
    pending = start_exchange(exchange, Pair(transition, written.transpose(-1, -2).unsqueeze(-1)), layout)
    incoming = pending.wait().squeeze(-1).transpose(-1, -2)
    plain = (None if x is None else x.detach() for x in (start_states, *inputs))
    o, final = ScanRead.apply(link, ends.final_pieces, ticket, incoming, *plain)
    return o, final


def _by_kernels(
    inputs: ScanInputs,
    delta_softplus: bool,
    initial_state: Tensor | None,
    output_final_state: bool,
    layout: SequenceLayout,
    exchange: str | Exchanger,
    chunk_size: int | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """By `longspan.gla`: a head per channel, with keys B, queries C, one value channel Δ u and log decays Δ A."""
    u, delta, A, B, C, D, z, bias = inputs
    steps = at_least_float32(delta)
    steps = steps if bias is None else steps + bias.to(steps.dtype)
    steps = F.softplus(steps) if delta_softplus else steps
    with without_autocast(u):
        result = apply_operator(
            "gla", C, B, (u * steps).to(u.dtype).unsqueeze(-1), {"g": steps.unsqueeze(-1) * A.to(steps.dtype)},
            output_final_state, scale=1.0, schedule="auto", layout=layout, exchange=exchange, backend="triton",
            chunk_size=chunk_size, initial_state=None if initial_state is None else initial_state.unsqueeze(-1),
        )  # fmt: skip
    read, state = result if isinstance(result, tuple) else (result, None)
    y = read.squeeze(-1)
    y = y if D is None else y + u * at_least_float32(D)
    y = y if z is None else y * F.silu(at_least_float32(z))
    y = y.to(u.dtype)
    return y if state is None else (y, state.squeeze(-1))
