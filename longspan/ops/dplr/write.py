"""The write phase: what a token's reads are, and what leaves the pieces that other ranks wait for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longspan.first_order import first_order
from longspan.layout.rows import take_rows
from longspan.ops.delta.call import (
    DeltaCall,
    anticausal_product,
    block_rows,
    causal_part,
    causal_product,
    gate_gradient,
    put_rows,
    take_block,
    take_out_own,
    ticket_like,
)
from longspan.ops.delta.chain import ChunkChain, steps
from longspan.ops.delta.write import PhaseLink, fold
from longspan.ops.dplr.system import ReadAndWritten, ahead_one, behind_one, solve
from longspan.ops.finite import all_finite, finite_part, from_then_on
from longspan.ops.matrices import batched_product, put_scaled, times


class LowRankWrite(torch.autograd.Function):
    """The write phase.

    | | shape | |
    |---|---|---|
    | keys | [B, 2T, H, K] or [B, T, H, K] | of each token b, then k; or b alone |
    | v, a | [B, T, H, V], [B, T, H, K] | |
    | g | of rows as `keys`, [B, ·, H], [B, ·, H, K] or None | zero for second rows |
    | start_states | [num_starting_pieces, B, H, K, V] or None | |
    | updates Ũ, weights W | [N, B, H, 2C, V], [N, B, H, 2C, K] | rows T M v and v, −T α and zero; or rows T v, −T α |
    | ends, products, keys, decays, ticket | as in `DeltaWrite` | |

    With two rows a token writes b wᵀ + k vᵀ, with one b (w + v)ᵀ.

    Backward, with λ as in `longspan.ops.delta.chain` and ∂w complete: ∂r = Tᵀ ∂w; ∂L = tril(∂r wᵀ, −1); ∂M = tril(∂r vᵀ, −1);
    ∂v += Mᵀ ∂r; ∂α = ∂r Sᵀ + ∂L b̃ + ∂M k̃; ∂b̃ = ∂Lᵀ α + w λᵀ; ∂k̃ = ∂Mᵀ α + v λᵀ, each with its factors.
    """

    @staticmethod
    def forward(
        ctx: Any,
        keys: Tensor,
        v: Tensor,
        a: Tensor,
        g: Tensor | None,
        start_states: Tensor | None,
        call: DeltaCall,
        end_pieces: tuple[int, ...],
        link: PhaseLink,
    ) -> tuple[Tensor | None, ...]:
        key_size, value_size, num_rows = keys.shape[-1], v.shape[-1], call.tiling.chunk_size
        num_tokens = call.of_tokens.chunk_size
        updates = call.allocate(keys, num_rows, value_size)
        weights = call.allocate(keys, num_rows, key_size)
        inverses = call.allocate(keys, num_tokens, num_tokens)
        decays = call.allocate(keys, num_rows, key_size) if call.factors.are_large else None
        # Of each token the row of b, then, if there is one, that of k.
        updates_by_row = updates.unflatten(3, (num_tokens, call.num_steps)).unbind(4)
        weights_by_row = weights.unflatten(3, (num_tokens, call.num_steps)).unbind(4)
        for of_values in weights_by_row[1:]:
            of_values.zero_()
        finite = all_finite(v)
        for number, (block, tokens) in enumerate(call.blocks):
            parts = ReadAndWritten.of(call, block, tokens, keys, a, g, None)
            system = solve(call, block, parts, g)
            # What the chunk's last token writes is in none of its systems.
            link.finite_keys &= system.bad is None and all_finite(parts.behind)
            dtype = system.inverse.dtype
            if dtype == torch.float64:
                link.in_double.add(number)
            if decays is not None and parts.query_of_rows is not None:
                put_rows(decays, block, parts.query_of_rows)
            put_rows(inverses, tokens, system.inverse)
            value = take_block(call, tokens, v)
            known = value.to(dtype) if finite else finite_part(value).to(dtype)
            if system.through is not None:
                known = batched_product(system.through, known)
            # Products of large numbers may overflow, and zeros of T would hand an infinity to earlier tokens.
            update = causal_product(system.inverse, known, all_finite(known))
            weight = batched_product(system.inverse, system.of_state).neg_()
            if system.bad is not None:
                weight = weight.masked_fill_(from_then_on(system.bad), torch.nan)
                update = update.masked_fill_(from_then_on(system.bad), torch.nan)
            if not finite:
                reached = from_then_on(~value.isfinite())
                update = update.masked_fill_(reached if system.through is None else behind_one(reached), torch.nan)
            put_rows(weights_by_row[0], tokens, weight)
            for target, values in zip(updates_by_row, (update, value), strict=False):
                put_rows(target, tokens, values)
        ends, products = fold(call, keys, g, decays, updates, weights, start_states, end_pieces, link)
        ctx.call, ctx.end_pieces, ctx.link, ctx.has_start = call, end_pieces, link, start_states is not None
        ctx.of_values = v.shape, v.dtype
        ctx.save_for_backward(keys, a, g, weights, inverses, decays)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(x for x in (products, decays) if x is not None))
        return updates, weights, ends, products, keys.detach(), decays, ticket_like(call, g, ctx.needs_input_grad[3])

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        _, _, grad_ends, _, dkeys, _, sums = grads
        call: DeltaCall = ctx.call
        link: PhaseLink = ctx.link
        keys, a, g, weights, inverses, decays = ctx.saved_tensors
        states, corrected, grad_states, grad_corrected = link.take(call, ctx.end_pieces, grad_ends)
        dkeys = torch.zeros_like(keys) if dkeys is None else dkeys
        shape, dtype = ctx.of_values
        da, dv = torch.empty_like(a), torch.empty(shape, dtype=dtype, device=a.device)
        gate = gate_gradient(call, g, ctx.needs_input_grad[3])
        chain, finite = ChunkChain(call, weights, None), link.finite_keys and link.finite_upstream
        for block, tokens in reversed(tuple(call.blocks)):
            parts = ReadAndWritten.of(call, block, tokens, keys, a, g, decays)
            if of_block := steps(call, block, link.sent):
                leaving = parts.leaving
                for step in reversed(of_block):
                    chain.retreat(step, leaving, grad_states, grad_corrected)
            update, grad_update = block_rows(corrected, block), block_rows(grad_corrected, block)
            state, grad_next = states[block.slots], grad_states[block.next_slots]
            triangle = block_rows(inverses, tokens, tokens.chunk_size)
            grad_right = anticausal_product(triangle, grad_update[:, :, :, :: call.num_steps], finite)
            grad_value, wide = grad_right, None
            if call.num_steps > 1 or call.factors.is_wide(block):
                pairs, wide = parts.pairs(call, block, g, call.dtype)
            if call.num_steps > 1:
                through = behind_one(pairs[..., 1::2])
                grad_value = grad_update[:, :, :, 1::2] + anticausal_product(through, grad_right, finite)
            grad_pairs = causal_part(ahead_one(batched_product(grad_right, update.mT)), call.num_steps)
            # No gate decays what a token reads of the one before it.
            own = () if gate is None else take_out_own(grad_pairs, call.num_steps)
            if wide is None:
                grad_later = times(causal_product(grad_pairs, parts.behind, finite), parts.query)
                grad_keys = times(anticausal_product(grad_pairs, parts.later_ahead, finite), parts.key)
            else:
                grad_later, grad_keys = wide.backward(grad_pairs)
            of_state = batched_product(grad_right, state.mT)
            grad_later = grad_later + times(times(ahead_one(of_state), parts.enter), parts.query)
            leaving = times(times(batched_product(update, grad_next.mT), parts.leave), parts.key)
            if gate is not None:
                of_rows = _product(parts.plain, grad_keys, gate.per_channel).neg_()
                call.last_rows(of_rows).add_(_product(parts.later, grad_later, gate.per_channel))
                gate.add_sums(of_rows)
                gate.add_earlier(parts.plain, leaving)
                gate.add_through(grad_next, state, call.factors.total(block))
                if sums is not None:
                    gate.add_sums(block.take(sums if sums.dim() == 4 else sums.unsqueeze(-1)))
                gate.close(block)
            grad_keys = grad_keys + leaving
            for row, of_row in enumerate(own):
                grad_later.addcmul_(of_row, parts.plain[:, :, :, row :: call.num_steps])
                grad_keys[:, :, :, row :: call.num_steps].addcmul_(of_row, parts.later)
            grad_a = behind_one(grad_later)
            grad_a[:, :, :, :1] = of_state[:, :, :, :1]
            put_scaled(dkeys, block, grad_keys, add=True)
            put_scaled(dv, tokens, grad_value)
            put_scaled(da, tokens, grad_a)
        grad_starts = None
        if ctx.has_start:
            grad_starts = take_rows(grad_states, call.tiling.start_slots, call.layout)
        return dkeys, dv, da, None if gate is None else gate.finish(), grad_starts, None, None, None


def _product(x: Tensor, grad: Tensor, per_channel: bool) -> Tensor:
    """x ⊙ ∂x, summed over K for a decay per head, ``[n, B, H, c, D]``."""
    return x * grad if per_channel else torch.linalg.vecdot(x, grad).unsqueeze(-1)
