"""The read phase of a decay: what tokens read inside their chunks and of the states before them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from longspan.first_order import first_order
from longspan.layout.rows import select_rows
from longspan.ops.decay.call import DecayCall, gate_gradient, put_states, states_of
from longspan.ops.decay.factors import BlockFactors, WideScores
from longspan.ops.decay.gate_gradient import GateGradient
from longspan.ops.finite import Harm, all_finite, finite_part, from_then_on, not_finite, rows_stay_apart
from longspan.ops.matrices import Factor, batched_product, flat, put_scaled, scaled, times, with_scale
from longspan.ops.tiling import ChunkBlock, unwritten_state_gradients


class DecayRead(torch.autograd.Function):
    """The read phase: the part inside chunks, the part from the states before them, or both in one pass.

    | | shape | |
    |---|---|---|
    | q | [B, T, H_k, K] | |
    | k, v | [B, T, H_k, K], [B, T, H, V] | used by the part inside chunks |
    | g | [B, T, H] or None | log decays; None where they take no gradient |
    | states | [num_slots, B, H, K, V] or None | from the write phase; None leaves that part out |
    | incoming | [num_segments, B, H, K, V] or None | the state that enters each segment from other stretches |
    | base | [B, T, H, V] or None | the part inside chunks, if computed before: the other part is added to it in place |
    | o | [B, T, H, V] | |

    Forward: o_t = scale · (e^{b_t} S_inᵀ q_t + Σ_{s≤t} e^{b_t−b_s} (q_t·k_s) v_s), where S_in is the chunk's state plus the decayed
    incoming one. Backward: ∂S_in = scale · Σ_t e^{b_t} q_t ∂o_tᵀ, and the gradients of the sum, all in one pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        g: Tensor | None,
        states: Tensor | None,
        incoming: Tensor | None,
        base: Tensor | None,
        call: DecayCall,
        value_size: int,
    ) -> Tensor:
        batch, num_tokens = q.shape[:2]
        is_finite = v is None or (all_finite(v) if states is None else _wrote_finite(call, states, v))
        rows_apart = rows_stay_apart(q) and (k is None or rows_stay_apart(k))
        query_of, key_of = (q, k) if rows_apart else (finite_part(q), None if k is None else finite_part(k))
        o = base
        if o is None:
            o = q.new_empty(batch, num_tokens, call.num_heads, value_size)
        else:
            ctx.mark_dirty(base)
        for block in call.tiling.blocks:
            factors = call.factors.block(block, g)
            query = scaled(block.take(query_of), with_scale(factors.query, call.scale), call.num_heads)
            out = None
            if key_of is not None and v is not None:
                value = scaled(block.take(v), None, call.num_heads)
                scores, _, _ = _scores(call, block, factors, g, query_of, key_of, query)
                out = torch.bmm(scores, flat(value if is_finite else finite_part(value)))
                if not is_finite:
                    out.masked_fill_(flat(from_then_on(not_finite(v, block, call.num_heads))), torch.nan)
            if states is not None:
                state = flat(states_of(block, factors, states, incoming).to(q.dtype))
                out = torch.bmm(flat(query), state) if out is None else out.baddbmm_(flat(query), state)
            assert out is not None
            if not rows_apart:
                out.masked_fill_(flat(_reads_not_finite(block, call.num_heads, q, k)), torch.nan)
            put_scaled(o, block, out.view(*query.shape[:4], value_size), add=base is not None)
        ctx.call = call
        ctx.has_base = base is not None
        ctx.save_for_backward(q, k, v, g, states, incoming)
        return o

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (do,) = grads
        call: DecayCall = ctx.call
        q, k, v, g, states, incoming = ctx.saved_tensors
        dq = torch.empty_like(q)
        dk = None if k is None else torch.empty_like(k)
        dv = None if v is None else torch.empty_like(v)
        gate = gate_gradient(call, g) if ctx.needs_input_grad[3] else None
        grad_states = None if states is None else unwritten_state_gradients(states, call.tiling, call.layout)
        grad_incoming = None if incoming is None else torch.zeros_like(incoming)
        inside = None
        if k is not None and v is not None and dk is not None and dv is not None:
            keys_are_finite = states is not None and _wrote_finite(call, states, k, v)
            inside = _InsideBackward(call, q, k, v, g, do, (dq, dk, dv), gate, keys_are_finite)
        for block in call.tiling.blocks:
            factors = call.factors.block(block, g)
            query = scaled(block.take(q), with_scale(factors.query, call.scale), call.num_heads)
            grad_out = scaled(block.take(do), None, call.num_heads)
            grad_query: Tensor | None = None
            is_finite = False
            if states is not None and grad_states is not None:
                state = flat(states_of(block, factors, states, incoming).to(q.dtype))
                grad_query = torch.bmm(flat(grad_out), state.mT)
                grad_state = batched_product(query.mT, grad_out)
                if inside is not None and inside.keys_are_finite:
                    # q and ∂o of every token are in it; it is smaller than the two, and in cache.
                    is_finite = all_finite(grad_state)
                put_states(grad_states, block.slots, grad_state, factors.enter)
                grad_state = grad_states[block.slots]
                if incoming is not None and grad_incoming is not None:
                    incoming_gradient(block, factors, grad_state, incoming, grad_incoming, gate)
            if inside is not None:
                inside.put(block, factors, query, grad_out, grad_query, is_finite)
            else:
                assert grad_query is not None
                if gate is not None:
                    gate.add(query, grad_query.view_as(query))
                put_scaled(dq, block, grad_query.view_as(query), with_scale(factors.query, call.scale))
            if gate is not None:
                gate.close(block)
        grad_base = do if ctx.has_base else None
        return dq, dk, dv, None if gate is None else gate.finish(), grad_states, grad_incoming, grad_base, None, None


def _reads_not_finite(block: ChunkBlock, num_heads: int, q: Tensor, k: Tensor | None) -> Tensor:
    """Which tokens of a block read by a query that is not finite, or a key of their chunk that is not, ``[n, B, H, c, 1]``."""
    of_query = not_finite(q, block, num_heads).any(-1, keepdim=True)
    return of_query if k is None else of_query | from_then_on(not_finite(k, block, num_heads).any(-1, keepdim=True))


def _wrote_finite(call: DecayCall, states: Tensor, *written: Tensor) -> bool:
    """Whether no number of k and v is NaN or infinite; looks at the states that leave pieces, or at `written` where that is less.

    What a token writes is still in the state at the end of its piece, where it is not finite: 0 · NaN keeps it even through a decay
    to nothing.
    """
    ends = call.tiling.last_slots
    if len(ends) * states[0].numel() < sum(x.numel() for x in written):
        return all_finite(select_rows(states, ends, call.layout))
    return all_finite(*written)


def _scores(
    call: DecayCall, block: ChunkBlock, factors: BlockFactors, g: Tensor | None, q: Tensor, k: Tensor, query: Tensor
) -> tuple[Tensor, Tensor, WideScores | None]:
    """scale · e^{b_t − b_s} (q_t·k_s) for s ≤ t, ``[n·B·H, c, c]``; the keys it used; and, for a wide block, its backward."""
    if not call.factors.is_wide(block):
        key = scaled(block.take(k), factors.key, call.num_heads)
        return torch.bmm(flat(query), flat(key).mT).tril_(), key, None
    key = scaled(block.take(k), None, call.num_heads)
    plain_query = scaled(block.take(q), None, call.num_heads)
    scores, wide = call.factors.wide_scores(block, g, plain_query, key, call.scale)
    return flat(scores), key, wide


@dataclass(frozen=True)
class _InsideBackward:
    """The backward of the part inside chunks; inputs, ∂o and `grads`, the (∂q, ∂k, ∂v) to be written, as in `DecayRead`.

    keys_are_finite: k and v are known to hold neither NaN nor infinity.
    """

    call: DecayCall
    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    do: Tensor
    grads: tuple[Tensor, Tensor, Tensor]
    gate: GateGradient | None
    keys_are_finite: bool

    @cached_property
    def _finite(self) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """q, k, v and ∂o with zeros for what is not finite; None if all is."""
        tensors = (self.q, self.k, self.v, self.do)
        if all_finite(*tensors):
            return None
        q, k, v, do = (finite_part(x) for x in tensors)
        return q, k, v, do

    def put(
        self,
        block: ChunkBlock,
        factors: BlockFactors,
        query: Tensor,
        grad_out: Tensor,
        grad_query: Tensor | None,
        is_finite: bool,
    ) -> None:
        """Write the block's gradients, with those of q through the states, ∂(scaled q) ``[n·B·H, c, K]``, in `grad_query`.

        is_finite: the block's q, k, v and ∂o are known to hold neither NaN nor infinity.
        """
        call, num_heads = self.call, self.call.num_heads
        q, k, v = self.q, self.k, self.v
        harm = None
        if not is_finite and self._finite is not None:
            harm = Harm.of(block, num_heads, q, k, v, self.do)
            q, k, v, do = self._finite
            query = scaled(block.take(q), with_scale(factors.query, call.scale), num_heads)
            grad_out = scaled(block.take(do), None, num_heads)
        value = scaled(block.take(v), None, num_heads)
        scores, key, wide = _scores(call, block, factors, self.g, q, k, query)
        grad_value = torch.bmm(scores.mT, flat(grad_out)).view_as(value)
        grad_scores = torch.bmm(flat(grad_out), flat(value).mT).tril_()
        own = self._take_out_own(scores, grad_scores, query.shape)
        of_channels = own is not None
        factor: Factor = None
        if wide is None:
            factor = with_scale(factors.query, call.scale)
            grad_key = torch.bmm(grad_scores.mT, flat(query)).view_as(key)
            if grad_query is None:
                grad_query = torch.bmm(grad_scores, flat(key))
            else:
                if not of_channels:
                    self._add_to_gate(query, grad_query)
                grad_query.baddbmm_(grad_scores, flat(key))
            grad_query = grad_query.view_as(query)
            if of_channels:
                self._add_to_gate(query, grad_query)
        else:
            inside, grad_key = wide.backward(grad_scores.view(*query.shape[:4], -1))
            if of_channels:
                self._add_to_gate(scaled(block.take(q), None, num_heads), inside)
            if grad_query is not None:
                grad_query = grad_query.view_as(query)
                self._add_to_gate(query, grad_query)
                # Bring the part from before the chunk to the same scale as the part inside it.
                inside = inside + times(grad_query * call.scale, factors.query)
            grad_query = inside
        if of_channels:
            self._add_to_gate(key, grad_key, -1.0)
        if harm is not None:
            grad_query, grad_key, grad_value = (
                grad.masked_fill(mask, torch.nan)
                for grad, mask in ((grad_query, harm.of_query), (grad_key, harm.of_key), (grad_value, harm.of_value))
            )
            if self.gate is not None:
                self.gate.mark(harm.of_gate(self.gate.per_channel))
        dq, dk, dv = self.grads
        put_scaled(dv, block, grad_value)
        put_scaled(dk, block, grad_key, factors.key if wide is None else None)
        put_scaled(dq, block, grad_query, factor)
        if own is not None:
            put_scaled(dq, block, scaled(block.take(k), None, num_heads), own, add=True)
            put_scaled(dk, block, scaled(block.take(q), None, num_heads), own, add=True)

    def _take_out_own(self, scores: Tensor, grad_scores: Tensor, shape: torch.Size) -> Tensor | None:
        """Keep what tokens read of themselves out of ∂g, in which it has no part.

        A decay per channel: its gradient is zeroed in `grad_scores`, and returned, scaled, ``[n, B, H, c, 1]``. A decay per head:
        ∂g takes the product of the two without its diagonal, which is written over `scores`; returns None.

        scores, grad_scores ``[n·B·H, c, c]``; shape: ``[n, B, H, c, ·]``.
        """
        if self.gate is None:
            return None
        if not self.gate.per_channel:
            pairs = scores.mul_(grad_scores)
            pairs.diagonal(dim1=-2, dim2=-1).zero_()
            self.gate.add_pairs(pairs.view(*shape[:4], -1))
            return None
        diagonal = grad_scores.diagonal(dim1=-2, dim2=-1)
        own = (diagonal * self.call.scale).view(*shape[:4], 1)
        diagonal.zero_()
        return own

    def _add_to_gate(self, x: Tensor, grad: Tensor, sign: float = 1.0) -> None:
        if self.gate is not None:
            self.gate.add(x, grad.view_as(x), sign)


def incoming_gradient(
    block: ChunkBlock,
    factors: BlockFactors,
    grad_state: Tensor,
    incoming: Tensor,
    grad_incoming: Tensor,
    gate: GateGradient | None,
) -> None:
    """Add the block's share of ∂S_in of its segments, and of the decay between the segment's start and each chunk."""
    for chunks, segment in block.continuing:
        grad = times(grad_state[chunks], None if factors.prefix is None else factors.prefix[chunks])
        grad_incoming[segment] += grad.sum(0)
        if gate is not None:
            numbers = block.chunks if isinstance(block.chunks, slice) else block.chunks[chunks]
            gate.add_prefix(numbers, grad, incoming[segment])
