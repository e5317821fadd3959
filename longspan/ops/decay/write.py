"""The write phase of a decay: the states between chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longspan.first_order import first_order
from longspan.layout.rows import take_rows
from longspan.ops.decay.call import DecayCall, gate_gradient, put_states
from longspan.ops.matrices import batched_product, put_scaled, scaled, times
from longspan.ops.tiling import ChunkBlock


def write_states(call: DecayCall, k: Tensor, v: Tensor, g: Tensor | None, start_states: Tensor | None) -> Tensor:
    """States between chunks, ``[num_slots, B, H, K, V]``: each piece starts from zero, or from its document's start state.

    start_states: ``[num_starting_pieces, B, H, K, V]``, for the pieces that start a document, in order.
    """
    tiling = call.tiling
    batch, _, _, key_size = k.shape
    states = torch.empty(
        tiling.num_slots, batch, call.num_heads, key_size, v.shape[-1], dtype=call.state_dtype, device=k.device
    )
    tiling.enter_pieces(states, range(len(tiling.pieces)), start_states)
    slots = states.unbind(0)
    for block in tiling.blocks:
        factors = call.factors.block(block, g)
        key = scaled(block.take(k), factors.key, call.num_heads)
        value = scaled(block.take(v), None, call.num_heads)
        written = batched_product(key.mT, value)
        put_states(states, block.next_slots, written, factors.leave)
        _scan(call, block, slots)
    return states


def _scan(call: DecayCall, block: ChunkBlock, slots: Sequence[Tensor]) -> None:
    """Turn what a block's chunks wrote into running states, in place, while they are in cache: ``S_{n+1} = e^{b_C} S_n + U_n``.

    The blocks of a piece come in its order, its tail last, so that the state before a block is final.
    """
    totals = call.factors.totals
    for chunk, slot in block.chunks_and_slots:
        if totals is None:
            slots[slot + 1].add_(slots[slot])
        else:
            slots[slot + 1].addcmul_(slots[slot], totals[chunk])


def _scan_adjoint(call: DecayCall, block: ChunkBlock, slots: Sequence[Tensor]) -> None:
    """The scan's adjoint for a block's chunks, in place: ``∂S_n += e^{b_C} ∂S_{n+1}``; blocks are taken in reverse."""
    totals = call.factors.totals
    for chunk, slot in reversed(block.chunks_and_slots):
        if totals is None:
            slots[slot].add_(slots[slot + 1])
        else:
            slots[slot].addcmul_(slots[slot + 1], totals[chunk])


class DecayWrite(torch.autograd.Function):
    """The write phase.

    | | shape | |
    |---|---|---|
    | k, v | [B, T, H_k, K], [B, T, H, V] | |
    | g | [B, T, H] or None | log decays; None where they take no gradient |
    | start_states | [num_starting_pieces, B, H, K, V] or None | |
    | states | [num_slots, B, H, K, V] | S between chunks, pieces starting from zero or their start state |
    | ends | [len(end_slots), B, H, K, V] | the states of `end_slots` once more, to be sent or returned |
    | k, v | as they came | for the read phase: it sends its gradients through here, where this phase's are added in place |

    Forward: S_{n+1} = e^{b_C} S_n + Σ_s e^{b_C − b_s} k_s v_sᵀ. Backward: ∂S_n += e^{b_C} ∂S_{n+1};
    ∂k_s = e^{b_C − b_s} ∂S_{n+1} v_s; ∂v_s = e^{b_C − b_s} ∂S_{n+1}ᵀ k_s; ∂g as in `longspan.ops.decay.gate_gradient`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        k: Tensor,
        v: Tensor,
        g: Tensor | None,
        start_states: Tensor | None,
        call: DecayCall,
        end_slots: tuple[int, ...],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        states = write_states(call, k, v, g, start_states)
        ctx.call, ctx.end_slots, ctx.has_start = call, end_slots, start_states is not None
        ctx.save_for_backward(k, v, g, states)
        ctx.set_materialize_grads(False)
        return states, take_rows(states, end_slots, call.layout), k.detach(), v.detach()

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_states, grad_ends, dk, dv = grads
        call: DecayCall = ctx.call
        k, v, g, states = ctx.saved_tensors
        # The read phase made these gradients for this node alone, so that the scan and the sums may run in place.
        total = torch.zeros_like(states) if grad_states is None else grad_states
        if grad_ends is not None:
            for row, slot in enumerate(ctx.end_slots):
                total[slot] += grad_ends[row]
        dk = torch.zeros_like(k) if dk is None else dk
        dv = torch.zeros_like(v) if dv is None else dv
        gate = gate_gradient(call, g) if ctx.needs_input_grad[2] else None
        slots = total.unbind(0)
        for block in reversed(call.tiling.blocks):
            _scan_adjoint(call, block, slots)
            factors = call.factors.block(block, g)
            key = scaled(block.take(k), factors.key, call.num_heads)
            value = scaled(block.take(v), None, call.num_heads)
            grad_next = total[block.next_slots]
            grad = times(grad_next, factors.leave).to(k.dtype)
            grad_key = batched_product(value, grad.mT)
            put_scaled(dk, block, grad_key, factors.key, add=True)
            put_scaled(dv, block, batched_product(key, grad), add=True)
            if gate is not None:
                gate.add_earlier(key, grad_key)
                gate.add_through(grad_next, states[block.slots], call.factors.total(block))
                gate.close(block)
        grad_start = None
        if ctx.has_start:
            grad_start = take_rows(total, call.tiling.start_slots, call.layout)
        return dk, dv, None if gate is None else gate.finish(), grad_start, None, None
