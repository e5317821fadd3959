"""The states between the chunks of a call of the delta rule, once it is known what enters every segment."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longspan.first_order import first_order
from longspan.ops.delta.call import DeltaCall
from longspan.ops.delta.chain import ChunkChain, walk
from longspan.ops.delta.write import PhaseLink


class DeltaRun(torch.autograd.Function):
    """The state that enters every chunk, and what each token truly writes.

    | | shape | |
    |---|---|---|
    | updates Ũ, weights W, decays | as in DeltaWrite | |
    | k, g, start_states | as in DeltaWrite | their gradients are found there |
    | incoming | [num_segments, B, H, K, V] or None | |
    | states S | [num_slots, B, H, K, V] | |
    | corrected u | [N, B, H, C, V] | Ũ − W S |

    Forward: as in `longspan.ops.delta.chain`. Backward: where no other rank receives the end of a piece, the gradient of that end
    is known here, and the piece is gone through. Of the other pieces only the gradient of what enters them is found, to be sent,
    and DeltaWrite goes through them when the gradient of their end has arrived.
    """

    @staticmethod
    def forward(
        ctx: Any,
        updates: Tensor,
        weights: Tensor,
        decays: Tensor | None,
        k: Tensor,
        g: Tensor | None,
        start_states: Tensor | None,
        incoming: Tensor | None,
        call: DeltaCall,
        link: PhaseLink,
    ) -> tuple[Tensor, Tensor]:
        states, corrected = link.states, link.corrected
        link.states = link.corrected = None
        if states is None or corrected is None:
            states = updates.new_empty(call.tiling.num_slots, *updates.shape[1:3], k.shape[-1], updates.shape[-1])
            corrected = call.allocate(k, *updates.shape[-2:])
        left = frozenset(range(len(call.tiling.pieces))) - link.done
        call.tiling.enter_pieces(states, left, start_states, incoming)
        chain = ChunkChain(call, weights, updates)
        for step, leaving in walk(call, left, k, g, decays):
            chain.advance(step, leaving, states, corrected)
        ctx.call, ctx.link = call, link
        ctx.num_incoming = None if incoming is None else incoming.shape[0]
        ctx.save_for_backward(weights, decays, k, g, states, corrected)
        return states, corrected

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_states, grad_corrected = grads
        call: DeltaCall = ctx.call
        link: PhaseLink = ctx.link
        weights, decays, k, g, states, corrected = ctx.saved_tensors
        chain = ChunkChain(call, weights, None)
        here = frozenset(range(len(call.tiling.pieces))) - link.sent
        for step, leaving in walk(call, here, k, g, decays, reverse=True):
            chain.retreat(step, leaving, grad_states, grad_corrected)
        grad_incoming = None
        if ctx.num_incoming is not None:
            grad_incoming = states.new_zeros(ctx.num_incoming, *states.shape[1:])
            for number, entry in enumerate(call.tiling.pieces):
                if entry.piece.starts_document:
                    continue
                if number in here:
                    grad_incoming[entry.piece.segment] += grad_states[entry.first_slot]
                else:
                    grad = grad_states[entry.last_slot].flatten(0, 1)
                    for step, leaving in walk(call, {number}, k, g, decays, reverse=True):
                        grad = chain.carried_back(step, leaving, grad, grad_states, grad_corrected)
                    grad_incoming[entry.piece.segment] += grad.view_as(grad_incoming[0])
        link.states, link.corrected = states, corrected
        link.grad_states, link.grad_corrected = grad_states, grad_corrected
        # The gradient of Ũ is ∂u, which DeltaWrite takes from the link once it is complete; this one orders the nodes.
        return grad_corrected, None, None, None, None, None, grad_incoming, None, None
