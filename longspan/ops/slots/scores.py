"""What queries read of the slots' keys, ``scale · K̃_t q_t``: the read phase of a decay from the other side of the state.

Inside a chunk that is ``Σ_{i ≤ t} e^{b_t − b_i} ⊙ s_i (k_i·q_t)``. A chunk is cut in halves again and again. In each cut the later
half's tokens read of the earlier half's through the decay from each earlier token to the cut and from the cut to each later one,
products of e^g, neither of which exceeds 1: nothing is divided by a decay, and a decay to nothing is a zero. No product has pairs
above the diagonal that a mask would have to take out, so that no token reaches an earlier one, whatever it holds. All is computed
in the dtype of the states.

Shapes: as in `longspan.ops.slots` and `longspan.ops.matrices`; C is the number of tokens of a chunk filled up to a power of two. A
state has its place among the slots of a tiling (`longspan.ops.tiling`), which are no memory slots.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from longspan.first_order import first_order
from longspan.ops.decay.call import DecayCall, gate_gradient, put_states, states_of
from longspan.ops.decay.factors import LOWEST_LOG_DECAY, BlockFactors, ChannelFactors, to_the_end
from longspan.ops.decay.gate_gradient import GateGradient
from longspan.ops.decay.read import incoming_gradient
from longspan.ops.matrices import batched_product, put_scaled, scaled
from longspan.ops.tiling import ChunkBlock, unwritten_state_gradients


class SlotScores(torch.autograd.Function):
    """The part inside chunks, the part from the states before them, or both.

    | | shape | |
    |---|---|---|
    | q | [B, T, H_k, K] | |
    | s, k | [B, T, H, M], [B, T, H, K]; or None | None leaves out the part inside chunks |
    | g | [B, T, H, M] | log decays |
    | states | [num_slots, B, H, M, K] or None | K̃ from the write phase; None leaves out the part from before |
    | incoming | [num_segments, B, H, M, K] or None | the state that enters each segment from other stretches |
    | scores | [B, T, H, M] | in the dtype of the states |

    Forward as on the module's page. Backward: ∂K̃_in = scale · Σ_t (e^{b_t} ⊙ ∂scores_t) q_tᵀ, and the gradients of the sum, cut by
    cut.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        s: Tensor | None,
        k: Tensor | None,
        g: Tensor,
        states: Tensor | None,
        incoming: Tensor | None,
        call: DecayCall,
    ) -> Tensor:
        scores = torch.empty(g.shape, dtype=call.state_dtype, device=q.device)
        for block in call.tiling.blocks:
            query, decays = _tokens(call, block, q) * call.scale, _decays(call, block, g)
            out: Tensor | None = None
            if states is not None:
                state = states_of(block, _prefix(call, block), states, incoming)
                out = decays.cumprod(3) * batched_product(query, state.mT)
            if s is not None and k is not None:
                inside = _Inside.of(query, _tokens(call, block, s), _tokens(call, block, k), decays)
                out = inside.forward() if out is None else out.add_(inside.forward())
            assert out is not None
            put_scaled(scores, block, out)
        ctx.call = call
        ctx.save_for_backward(q, s, k, g, states, incoming)
        return scores

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (do,) = grads
        call: DecayCall = ctx.call
        q, s, k, g, states, incoming = ctx.saved_tensors
        dq = torch.empty_like(q)
        ds = None if s is None else torch.empty_like(s)
        dk = None if k is None else torch.empty_like(k)
        gate = gate_gradient(call, g) if ctx.needs_input_grad[3] else None
        grad_states = None if states is None else unwritten_state_gradients(states, call.tiling, call.layout)
        grad_incoming = None if incoming is None else torch.zeros_like(incoming)
        for block in call.tiling.blocks:
            query, decays = _tokens(call, block, q) * call.scale, _decays(call, block, g)
            grad_out = _tokens(call, block, do)
            grad_query: Tensor | None = None
            if states is not None and grad_states is not None:
                prefix = _prefix(call, block)
                state, from_start = states_of(block, prefix, states, incoming), decays.cumprod(3)
                grad_read = from_start * grad_out
                grad_query = batched_product(grad_read, state)
                put_states(grad_states, block.slots, batched_product(grad_read.mT, query), None)
                if gate is not None:
                    gate.add(from_start * batched_product(query, state.mT), grad_out)
                if incoming is not None and grad_incoming is not None:
                    incoming_gradient(block, prefix, grad_states[block.slots], incoming, grad_incoming, gate)
            if s is not None and k is not None and ds is not None and dk is not None:
                inside = _Inside.of(query, _tokens(call, block, s), _tokens(call, block, k), decays)
                of_inside, grad_weight, grad_key = inside.backward(grad_out, gate)
                grad_query = of_inside if grad_query is None else grad_query.add_(of_inside)
                put_scaled(ds, block, grad_weight)
                put_scaled(dk, block, grad_key)
            assert grad_query is not None
            put_scaled(dq, block, grad_query, call.scale)
            if gate is not None:
                gate.close(block)
        return dq, ds, dk, None if gate is None else gate.finish(), grad_states, grad_incoming, None


def _tokens(call: DecayCall, block: ChunkBlock, x: Tensor) -> Tensor:
    """The block's tokens of x with heads repeated to H, ``[n, B, H, c, D]`` in the dtype of the states, zero at padding."""
    return block.without_padding(scaled(block.take(x), None, call.num_heads)).to(call.state_dtype)


def _decays(call: DecayCall, block: ChunkBlock, g: Tensor) -> Tensor:
    """e^g of the block, ``[n, B, H, c, M]``, 1 at padding."""
    return block.without_padding(block.take(g).to(call.state_dtype)).clamp(min=LOWEST_LOG_DECAY).exp()


def _prefix(call: DecayCall, block: ChunkBlock) -> BlockFactors:
    """The decay from the start of a piece to the block's chunks: all that states take where no factor stands inside chunks."""
    assert isinstance(call.factors, ChannelFactors)
    return BlockFactors(None, None, None, None, call.factors.prefix(block))


@dataclass(frozen=True)
class _Inside:
    """What the tokens of a block read of each other, Σ_{i ≤ t} e^{b_t − b_i} ⊙ s_i (k_i·q_t), by halves.

    query, key ``[n, B, H, C, K]`` and weight, decays ``[n, B, H, C, M]`` (s and e^g), filled up to C; size: c, how many are tokens.
    """

    query: Tensor
    weight: Tensor
    key: Tensor
    decays: Tensor
    size: int

    @classmethod
    def of(cls, query: Tensor, weight: Tensor, key: Tensor, decays: Tensor) -> _Inside:
        """Of ``[n, B, H, c, ·]``, zero at padding."""
        size = query.shape[3]
        rows = (0, 0, 0, (1 << (size - 1).bit_length()) - size)
        query, weight, key = (pad(x, rows) for x in (query, weight, key))
        return cls(query, weight, key, pad(decays, rows, value=1.0), size)

    def forward(self) -> Tensor:
        """``[n, B, H, c, M]``."""
        out = (self.query * self.key).sum(-1, keepdim=True) * self.weight
        for half in self._halves():
            from_cut, to_cut = self._decays_at_cut(half)
            scores = _later(self.query, half) @ _earlier(self.key, half).mT
            _later(out, half).add_((scores @ (_earlier(self.weight, half) * to_cut)) * from_cut)
        return out[:, :, :, : self.size]

    def backward(self, grad_out: Tensor, gate: GateGradient | None) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, weight and key, given ∂scores ``[n, B, H, c, M]``, zero at padding; ∂g goes to `gate`."""
        do = pad(grad_out, (0, 0, 0, self.query.shape[3] - self.size))
        read, dw = torch.zeros_like(self.weight), torch.zeros_like(self.weight)
        dq, dk = torch.zeros_like(self.query), torch.zeros_like(self.key)
        for half in self._halves():
            from_cut, to_cut = self._decays_at_cut(half)
            query, key = _later(self.query, half), _earlier(self.key, half)
            scores, written = query @ key.mT, _earlier(self.weight, half) * to_cut
            grad_read = _later(do, half) * from_cut
            grad_scores = grad_read @ written.mT
            if gate is not None:
                _later(read, half).add_((scores @ written) * from_cut)
            _earlier(dw, half).add_((scores.mT @ grad_read) * to_cut)
            _later(dq, half).add_(grad_scores @ key)
            _earlier(dk, half).add_(grad_scores.mT @ query)
        own = (x[:, :, :, : self.size] for x in (read, dq, dw, dk, self.query, self.weight, self.key))
        read, dq, dw, dk, query, weight, key = own
        if gate is not None:
            # Both without what a token reads of itself, which its gate does not decay.
            gate.add(read, grad_out)
            gate.add(weight, dw, -1.0)
        score, grad_score = ((x * y).sum(-1, keepdim=True) for x, y in ((query, key), (grad_out, weight)))
        return dq + grad_score * key, dw + score * grad_out, dk + grad_score * query

    def _halves(self) -> Iterator[int]:
        half = self.query.shape[3] // 2
        while half:
            yield half
            half //= 2

    def _decays_at_cut(self, half: int) -> tuple[Tensor, Tensor]:
        """The decay from the cut to each later token, and from each earlier token to the cut, ``[n, B, H, cuts, half, M]``."""
        return _later(self.decays, half).cumprod(-2), to_the_end(_earlier(self.decays, half))


def _later(x: Tensor, half: int) -> Tensor:
    """Of every 2 · half tokens of ``x [n, B, H, C, D]`` the later ones, a view ``[n, B, H, cuts, half, D]``."""
    return x.unflatten(3, (-1, 2, half))[:, :, :, :, 1]


def _earlier(x: Tensor, half: int) -> Tensor:
    """The earlier ones, likewise."""
    return x.unflatten(3, (-1, 2, half))[:, :, :, :, 0]
