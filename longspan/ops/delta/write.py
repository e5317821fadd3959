"""The write phase of the delta rule: what each token writes, and what leaves the pieces that other ranks wait for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from longspan.first_order import first_order
from longspan.layout.rows import take_rows
from longspan.ops.delta.call import (
    DeltaCall,
    anticausal_product,
    block_keys,
    block_rows,
    causal_product,
    gate_gradient,
    put_rows,
    scores,
    take_block,
    ticket_like,
)
from longspan.ops.delta.chain import ChunkChain, steps, walk
from longspan.ops.delta.solve import solve
from longspan.ops.finite import all_finite
from longspan.ops.matrices import batched_product, flat, put_scaled, times


@dataclass
class PhaseLink:
    """What the write and run nodes of one call hand to each other.

    sent: numbers of the pieces whose end another rank receives. done: those that write has gone through. states, corrected:
    forward, those of `done` pieces; backward, those that run kept. grad_states, grad_corrected: what run's backward hands to
    write's; of pieces that are sent it is the reads' share alone. finite_keys: whether k and β are known to hold neither NaN nor
    infinity; finite_upstream: the same of the gradients of the outputs. in_double: numbers of the blocks whose systems were solved
    in float64, because T may be far from small.
    """

    sent: frozenset[int]
    done: frozenset[int] = frozenset()
    states: Tensor | None = None
    corrected: Tensor | None = None
    grad_states: Tensor | None = None
    grad_corrected: Tensor | None = None
    finite_keys: bool = True
    finite_upstream: bool = True
    in_double: set[int] = field(default_factory=set)

    def take(
        self, call: DeltaCall, end_pieces: tuple[int, ...], grad_ends: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What run's backward left: states, corrected and their gradients, with what arrived for the ends of sent pieces."""
        states, corrected, grad_states, grad_corrected = (
            self.states,
            self.corrected,
            self.grad_states,
            self.grad_corrected,
        )
        self.states = self.corrected = self.grad_states = self.grad_corrected = None
        if states is None or corrected is None or grad_states is None or grad_corrected is None:
            raise RuntimeError("the output of every rank must enter the loss: this rank's has not been read")
        if grad_ends is not None:
            for row, number in enumerate(end_pieces):
                if number in self.sent:
                    grad_states[call.tiling.pieces[number].last_slot] += grad_ends[row]
        return states, corrected, grad_states, grad_corrected


class DeltaWrite(torch.autograd.Function):
    """The write phase.

    | | shape | |
    |---|---|---|
    | k, v, beta | [B, T, H_k, K], [B, T, H, V], [B, T, H] | |
    | g | [B, T, H], [B, T, H, K] or None | |
    | start_states | [num_starting_pieces, B, H, K, V] or None | |
    | updates Ũ, weights W | [N, B, H, C, V], [N, B, H, C, K] | T (β v), T (β k̂) e^m; zero at padding |
    | ends | [len(end_pieces), B, H, K, V] | of sent pieces, from zero or their document's start state; else zero |
    | products | [len(end_pieces), B, H, K, K] | A of the sent pieces that continue a document; no gradient |
    | k | as it came | for the read phase: its gradient of k arrives here, where this phase's is added in place |
    | decays | [N, B, H, C, K] or None | e^{b − m}, kept for later phases where it is as large as k; no gradient |
    | ticket | the shape of g, or None | see `TokenSums` |

    Backward, with λ as in `longspan.ops.delta.chain` and ∂u complete: ∂r = Tᵀ ∂u; ∂L = −tril(∂r uᵀ, −1); z = ∂L k̃ − ∂r (e^m S)ᵀ;
    ∂v = β ∂r; ∂k̂ = β z; ∂k̃ = ∂Lᵀ β k̂ + e^{b_C−m} u λᵀ; ∂β = ⟨∂r, v⟩ + ⟨z, k̂⟩; b_C gets ⟨S_out, λ⟩.

    The products take no gradient of their own: those above are formed with the true states, which hold what arrived.
    """

    @staticmethod
    def forward(
        ctx: Any,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        g: Tensor | None,
        start_states: Tensor | None,
        call: DeltaCall,
        end_pieces: tuple[int, ...],
        link: PhaseLink,
    ) -> tuple[Tensor | None, ...]:
        key_size, value_size, chunk_size = k.shape[-1], v.shape[-1], call.tiling.chunk_size
        updates = call.allocate(k, chunk_size, value_size)
        weights = call.allocate(k, chunk_size, key_size)
        inverses = call.allocate(k, chunk_size, chunk_size)
        decays = call.allocate(k, chunk_size, key_size) if call.factors.are_large else None
        finite = all_finite(v)
        for number, block in enumerate(call.tiling.blocks):
            system = solve(call, block, k, beta, g)
            keys = system.keys
            link.finite_keys &= system.bad is None
            if system.inverse.dtype == torch.float64:
                link.in_double.add(number)
            if decays is not None and keys.query is not None:
                put_rows(decays, block, keys.query)
            put_rows(inverses, block, system.inverse)
            system.put(updates, block, take_block(call, block, v), finite)
            system.put(weights, block, times(keys.ahead, keys.enter), True)
        ends, products = fold(call, k, g, decays, updates, weights, start_states, end_pieces, link)
        ctx.call, ctx.end_pieces, ctx.link, ctx.has_start = call, end_pieces, link, start_states is not None
        ctx.save_for_backward(k, v, beta, g, weights, inverses, decays)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(x for x in (products, decays) if x is not None))
        return updates, weights, ends, products, k.detach(), decays, ticket_like(call, g, ctx.needs_input_grad[3])

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        _, _, grad_ends, _, dk, _, sums = grads
        call: DeltaCall = ctx.call
        link: PhaseLink = ctx.link
        k, v, beta, g, weights, inverses, decays = ctx.saved_tensors
        states, corrected, grad_states, grad_corrected = link.take(call, ctx.end_pieces, grad_ends)
        dk = torch.zeros_like(k) if dk is None else dk
        dv, dbeta = torch.empty_like(v), torch.empty_like(beta)
        gate = gate_gradient(call, g, ctx.needs_input_grad[3])
        chain, finite = ChunkChain(call, weights, None), link.finite_keys and link.finite_upstream
        for block in reversed(call.tiling.blocks):
            keys = block_keys(call, block, k, g, decays)
            if of_block := steps(call, block, link.sent):
                leaving = keys.leaving
                for step in reversed(of_block):
                    chain.retreat(step, leaving, grad_states, grad_corrected)
            strength = take_block(call, block, beta.unsqueeze(-1))
            value = take_block(call, block, v)
            update = block_rows(corrected, block)
            state, grad_next = states[block.slots], grad_states[block.next_slots]
            triangle = block_rows(inverses, block, block.chunk_size)
            grad_right = anticausal_product(triangle, block_rows(grad_corrected, block), finite)
            grad_lower = batched_product(grad_right, update.mT).tril_(-1).neg_()
            # As in DeltaScores: no gate decays what a token's rows erase of each other.
            own = None if gate is None else _take_out_rows_of_tokens(grad_lower, call.num_steps)
            from_before = times(batched_product(grad_right, state.mT), keys.enter)
            grad_strength = torch.linalg.vecdot(grad_right, value)
            grad_leaving = times(batched_product(update, grad_next.mT), keys.leave)
            if call.factors.is_wide(block):
                # The rows of L are k with its β, so that both gradients come from one call.
                _, wide = scores(call, block, g, strength * keys.plain, keys.plain, keys.ahead, keys.behind)
                assert wide is not None
                first, second = wide.backward(grad_lower)
                grad_strength += torch.linalg.vecdot(keys.plain, first) - torch.linalg.vecdot(keys.ahead, from_before)
                plus = strength * (first - times(from_before, keys.query))
                minus = second
            else:
                grad_ahead = causal_product(grad_lower, keys.behind, finite).sub_(from_before)
                grad_strength += torch.linalg.vecdot(keys.ahead, grad_ahead)
                plus = times(strength * grad_ahead, keys.query)
                minus = times(anticausal_product(grad_lower, strength * keys.ahead, finite), keys.key)
            leaving = times(grad_leaving, keys.key)
            of_pairs = None if gate is None else plus - minus
            grad_key = plus.add_(minus).add_(leaving)
            if own is not None:
                rows, weighted = (x.unflatten(3, (-1, call.num_steps)) for x in (keys.plain, strength * keys.plain))
                erased = (own @ rows).flatten(3, 4)
                grad_strength += torch.linalg.vecdot(keys.plain, erased)
                grad_key.addcmul_(erased, strength).add_((own.mT @ weighted).flatten(3, 4))
            put_scaled(dk, block, grad_key, add=True)
            put_scaled(dv, block, strength * grad_right)
            put_scaled(dbeta.unsqueeze(-1), block, grad_strength.unsqueeze(-1))
            if gate is not None and of_pairs is not None:
                gate.add(keys.plain, of_pairs)
                gate.add_earlier(keys.plain, leaving)
                gate.add_through(grad_next, state, call.factors.total(block))
                if sums is not None:
                    gate.add_sums(block.take(sums if sums.dim() == 4 else sums.unsqueeze(-1)))
                gate.close(block)
        grad_starts = None
        if ctx.has_start:
            grad_starts = take_rows(grad_states, call.tiling.start_slots, call.layout)
        return dk, dv, dbeta, None if gate is None else gate.finish(), grad_starts, None, None, None


def _take_out_rows_of_tokens(lower: Tensor, num_steps: int) -> Tensor | None:
    """Zero a lower triangle between rows of one token, in place, and return that, ``[n, B, H, c, num_steps, num_steps]``.

    lower: ``[n, B, H, c · num_steps, c · num_steps]``. None where tokens have one row.
    """
    if num_steps == 1:
        return None
    squares = lower.unflatten(-1, (-1, num_steps)).unflatten(-3, (-1, num_steps)).diagonal(dim1=3, dim2=5)
    own = squares.movedim(-1, 3).clone()
    squares.zero_()
    return own


def fold(
    call: DeltaCall,
    k: Tensor,
    g: Tensor | None,
    decays: Tensor | None,
    updates: Tensor,
    weights: Tensor,
    start_states: Tensor | None,
    end_pieces: tuple[int, ...],
    link: PhaseLink,
) -> tuple[Tensor, Tensor]:
    """What leaves the sent pieces: their end states and, where they continue a document, the product of their transitions."""
    batch, heads, _, key_size = weights.shape[1:]
    value_size = updates.shape[-1]
    ends = weights.new_zeros(len(end_pieces), batch, heads, key_size, value_size)
    products = weights.new_zeros(len(end_pieces), batch, heads, key_size, key_size)
    chain = ChunkChain(call, weights, updates)
    link.done = link.sent & call.tiling.start_rows.keys()
    if link.done:
        # From its document's start a piece's states are the true ones, whatever arrives.
        link.states = weights.new_empty(call.tiling.num_slots, batch, heads, key_size, value_size)
        link.corrected = call.allocate(k, *updates.shape[-2:])
    for row, number in enumerate(end_pieces):
        if number not in link.sent:
            continue
        entry = call.tiling.pieces[number]
        chunk_steps = walk(call, {number}, k, g, decays)
        if number in link.done:
            assert link.states is not None and link.corrected is not None
            call.tiling.enter_pieces(link.states, [number], start_states)
            for step, leaving in chunk_steps:
                chain.advance(step, leaving, link.states, link.corrected)
            ends[row] = link.states[entry.last_slot]
            continue
        state = flat(ends[row])
        passed = torch.eye(key_size, dtype=call.dtype, device=k.device).expand(state.shape[0], -1, -1)
        for step, leaving in chunk_steps:
            state = chain.carried(step, leaving, state, writes=True)
            passed = chain.carried(step, leaving, passed, writes=False)
        ends[row], products[row] = state.view_as(ends[row]), passed.view_as(products[row])
    return ends, products
