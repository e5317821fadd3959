"""The read phase of the delta rule: scores of queries and keys, before anything has arrived; then the output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longspan.first_order import first_order
from longspan.layout.rows import select_rows
from longspan.ops.delta.call import (
    DeltaCall,
    TokenSums,
    anticausal_product,
    block_keys,
    block_queries,
    block_rows,
    causal_part,
    causal_product,
    of_any_row,
    of_every_row,
    poison_rows,
    put_product,
    put_rows,
    scores,
    state_factor,
    take_block,
    take_out_own,
)
from longspan.ops.delta.write import PhaseLink
from longspan.ops.finite import all_finite, finite_part, from_then_on, until_then
from longspan.ops.matrices import batched_product, flat, put_scaled, scaled, times
from longspan.ops.tiling import unwritten_state_gradients


class DeltaScores(torch.autograd.Function):
    """What the queries make of the keys of their own chunk.

    | | shape | |
    |---|---|---|
    | q, k | [B, T, H_k, K] | |
    | ticket, g, decays | as in DeltaWrite | |
    | scores P | [N, B, H, C, C] | tril(q̂ k̃ᵀ) |
    | q, ticket | as they came | their gradients from DeltaRead arrive here, where this phase's are added in place |

    Backward: ∂q̂ = ∂P k̃; ∂k̃ = ∂Pᵀ q̂.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        ticket: Tensor | None,
        g: Tensor | None,
        decays: Tensor | None,
        call: DeltaCall,
        link: PhaseLink,
        scale: float,
    ) -> tuple[Tensor | None, ...]:
        found = call.allocate(q, call.of_tokens.chunk_size, call.tiling.chunk_size)
        for block, tokens in call.blocks:
            keys = block_keys(call, block, k, g, decays)
            queries = block_queries(call, block, tokens, q, scale, g, decays)
            block_scores, _ = scores(call, block, g, queries.plain, keys.plain, queries.ahead, keys.behind)
            put_rows(found, tokens, causal_part(block_scores, call.num_steps))
        ctx.call, ctx.link, ctx.scale = call, link, scale
        ctx.save_for_backward(q, k, ticket, g, decays)
        ctx.set_materialize_grads(False)
        return found, q.detach(), None if ticket is None else ticket.detach()

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_scores, dq, total = grads
        call: DeltaCall = ctx.call
        q, k, ticket, g, decays = ctx.saved_tensors
        assert grad_scores is not None and dq is not None
        dk = torch.empty_like(k)
        sums, finite = TokenSums(call, ticket, total), ctx.link.finite_keys and all_finite(q)
        for block, tokens in call.blocks:
            keys = block_keys(call, block, k, g, decays)
            queries = block_queries(call, block, tokens, q, ctx.scale, g, decays)
            grad = causal_part(block_rows(grad_scores, tokens, block.chunk_size).clone(), call.num_steps)
            # No gate decays what a token reads of itself: its share of ∂g would be rounding alone.
            own = take_out_own(grad, call.num_steps) if sums.total is not None else ()
            if call.factors.is_wide(block):
                _, wide = scores(call, block, g, queries.plain, keys.plain, queries.ahead, keys.behind)
                assert wide is not None
                grad_query, grad_key = wide.backward(grad)
            else:
                grad_query = times(causal_product(grad, keys.behind, finite), queries.query)
                grad_key = times(anticausal_product(grad, queries.ahead, finite), keys.key)
            sums.add(block, tokens, queries.plain, grad_query, subtracted=(keys.plain, grad_key))
            for step, of_step in enumerate(own):
                grad_query.addcmul_(of_step, keys.plain[:, :, :, step :: call.num_steps])
                grad_key[:, :, :, step :: call.num_steps].addcmul_(of_step, queries.plain)
            put_scaled(dq, tokens, ctx.scale * grad_query, add=True)
            put_scaled(dk, block, grad_key)
        return dq, dk, sums.total, None, None, None, None, None


class DeltaRead(torch.autograd.Function):
    """The output.

    | | shape | |
    |---|---|---|
    | scores P, q, ticket | as in DeltaScores | |
    | states S, corrected u | as in DeltaRun | |
    | g, decays | as in DeltaWrite | |
    | o | [B, T, H, V] | P u + scale · e^b q S |

    Backward: ∂P = ∂o uᵀ; ∂u = Pᵀ ∂o; ∂q = scale · e^b ∂o Sᵀ; ∂S = (scale · e^b q)ᵀ ∂o.

    ∂u grows with the tokens behind where keys resemble each other, and Tᵀ ∂u then takes differences of it: where T is float64, so
    are the sums of ∂u.
    """

    @staticmethod
    def forward(
        ctx: Any,
        found: Tensor,
        q: Tensor,
        ticket: Tensor | None,
        states: Tensor,
        corrected: Tensor,
        g: Tensor | None,
        decays: Tensor | None,
        call: DeltaCall,
        link: PhaseLink,
        scale: float,
    ) -> Tensor:
        o = q.new_empty(*q.shape[:2], call.num_heads, corrected.shape[-1])
        # What a token writes is still in the state at the end of its piece, where it is not finite.
        finite = all_finite(select_rows(states, call.tiling.last_slots, call.layout))
        for block, tokens in call.blocks:
            query = scaled(take_block(call, tokens, q), state_factor(call, block, scale, g, decays), call.num_heads)
            out = batched_product(query, states[block.slots])
            update = block_rows(corrected, block)
            score = block_rows(found, tokens, block.chunk_size)
            flat(out).baddbmm_(flat(score), flat(update if finite else finite_part(update)))
            if not finite:
                out.masked_fill_(from_then_on(of_any_row(~update.isfinite(), tokens.chunk_size)), torch.nan)
            put_scaled(o, tokens, out)
        ctx.call, ctx.link, ctx.scale = call, link, scale
        ctx.save_for_backward(found, q, ticket, states, corrected, g, decays)
        return o

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (do,) = grads
        call: DeltaCall = ctx.call
        found, q, ticket, states, corrected, g, decays = ctx.saved_tensors
        dq = torch.empty_like(q)
        sums, finite = TokenSums(call, ticket, None), all_finite(do)
        grad_found, grad_corrected = call.allocate(q, *found.shape[-2:]), call.allocate(q, *corrected.shape[-2:])
        ctx.link.finite_upstream &= finite
        grad_states = unwritten_state_gradients(states, call.tiling, call.layout)
        for number, (block, tokens) in enumerate(call.blocks):
            factor = state_factor(call, block, ctx.scale, g, decays)
            query = scaled(take_block(call, tokens, q), factor, call.num_heads)
            grad_out = take_block(call, tokens, do).contiguous()
            update, score = block_rows(corrected, block), block_rows(found, tokens, block.chunk_size)
            if isinstance(block.chunks, slice) and block.chunk_size == call.tiling.chunk_size:
                put_product(grad_found, tokens, grad_out, update.mT)
            else:
                put_rows(grad_found, tokens, batched_product(grad_out, update.mT))
            upstream = grad_out if finite else finite_part(grad_out)
            if number in ctx.link.in_double and call.dtype != torch.float64:
                put_rows(grad_corrected, block, batched_product(score.mT.double(), upstream.double()))
            else:
                put_product(grad_corrected, block, score.mT, upstream)
            if not finite:
                poison_rows(grad_corrected, block, of_every_row(until_then(~grad_out.isfinite()), block.chunk_size))
            grad_states[block.slots] = batched_product(query.mT, grad_out)
            grad_query = batched_product(grad_out, states[block.slots].mT)
            sums.add(block, tokens, query, grad_query)
            put_scaled(dq, tokens, grad_query, factor)
        return grad_found, dq, sums.total, grad_states, grad_corrected, None, None, None, None, None
