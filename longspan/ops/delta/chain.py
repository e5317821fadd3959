"""Going through the chunks of a call one after another, forward with states and backward with their gradients.

    u_n = Ũ_n − W_n S_n        S_{n+1} = e^{b_C} S_n + E_nᵀ u_n              E_n = e^{b_C − m} k̃
    ∂u_n += E_n λ_{n+1}        λ_n = ∂S_n + e^{b_C} λ_{n+1} − W_nᵀ ∂u_n

The chunks of a block of full chunks follow one another in one piece; those of a block of tails belong to different pieces, and
are computed at once. A block may be gone through for some pieces alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.layout.rows import index_on
from longspan.ops.delta.call import DeltaCall, leaving_keys
from longspan.ops.tiling import ChunkBlock


@dataclass(frozen=True)
class ChunkStep:
    """One chunk, or the tails of several pieces.

    numbers: of the chunks, as the host knows them. chunks, slots, next_slots, places: the same numbers, the slots that they read
    and write, and their places in the block. size: tokens per chunk.
    """

    numbers: tuple[int, ...]
    chunks: int | Tensor
    slots: int | Tensor
    next_slots: int | Tensor
    places: int | Tensor
    size: int


def steps(call: DeltaCall, block: ChunkBlock, pieces: Collection[int]) -> Sequence[ChunkStep]:
    """What to go through of a block, in order, for the chunks of `pieces`."""
    if not pieces:
        return ()
    if isinstance(block.chunks, slice):
        if call.tiling.piece_of_chunk(block.chunks.start) not in pieces:
            return ()
        numbered = enumerate(block.chunks_and_slots)
        return [
            ChunkStep((chunk,), chunk, slot, slot + 1, place, block.chunk_size) for place, (chunk, slot) in numbered
        ]
    chosen = [
        (place, chunk, slot)
        for place, (chunk, slot) in enumerate(block.chunks_and_slots)
        if call.tiling.piece_of_chunk(chunk) in pieces
    ]
    if not chosen:
        return ()
    places, numbers, slots = zip(*chosen, strict=True)
    device = block.chunks.device
    return [
        ChunkStep(
            numbers,
            chunks=index_on(call.layout, numbers, device),
            slots=index_on(call.layout, slots, device),
            next_slots=index_on(call.layout, [slot + 1 for slot in slots], device),
            places=index_on(call.layout, places, device),
            size=block.chunk_size,
        )
    ]


def walk(
    call: DeltaCall,
    pieces: Collection[int],
    k: Tensor,
    g: Tensor | None,
    decays: Tensor | None,
    reverse: bool = False,
) -> Iterator[tuple[ChunkStep, Tensor]]:
    """The steps of `pieces` in order, or in reverse, each with E of its block, ``[n, B, H, c, K]``."""
    for block in reversed(call.tiling.blocks) if reverse else call.tiling.blocks:
        if found := steps(call, block, pieces):
            leaving = leaving_keys(call, block, k, g, decays)
            for step in reversed(found) if reverse else found:
                yield step, leaving


class ChunkChain:
    """The tensors of a call by chunk or slot, as batches of B·H matrices.

    weights W, updates Ũ ``[N, B, H, C, ·]``; totals as `DeltaCall.totals`.
    """

    def __init__(self, call: DeltaCall, weights: Tensor, updates: Tensor | None) -> None:
        self._weights, self._updates = weights, updates
        self._totals = call.totals(weights.shape[1])

    def _matrices(self, x: Tensor, step: ChunkStep) -> Tensor:
        """The step's rows of ``x [N, B, H, C, D]``, a batch of matrices."""
        return x[step.chunks][..., : step.size, :].flatten(0, -3)

    def _leaving(self, leaving: Tensor, step: ChunkStep) -> Tensor:
        return leaving[step.places].flatten(0, -3)

    def _times_total(self, state: Tensor, step: ChunkStep) -> Tensor:
        """e^{b_C} S for a batch of matrices."""
        if self._totals is None:
            return state
        if isinstance(step.chunks, int):
            return state * self._totals[step.chunks]
        return state * torch.cat([self._totals[chunk] for chunk in step.numbers])

    def advance(self, step: ChunkStep, leaving: Tensor, states: Tensor, corrected: Tensor) -> None:
        """Compute u of a step's chunks and the states after them, in their places.

        leaving: E of the block, ``[n, B, H, c, K]``. states: ``[num_slots, B, H, K, V]``; corrected: ``[N, B, H, C, V]``.
        """
        assert self._updates is not None
        before = states[step.slots].flatten(0, -3)
        weights, updates = self._matrices(self._weights, step), self._matrices(self._updates, step)
        leaving = self._leaving(leaving, step)
        if not isinstance(step.chunks, int):
            found = torch.baddbmm(updates, weights, before, alpha=-1)
            after = torch.baddbmm(self._times_total(before, step), leaving.mT, found)
            shape = (-1, *corrected.shape[1:3])
            corrected[step.chunks, :, :, : step.size] = found.unflatten(0, shape)
            states[step.next_slots] = after.unflatten(0, shape)
            return
        found = self._matrices(corrected, step)
        after = states[step.next_slots].flatten(0, -3)
        torch.baddbmm(updates, weights, before, alpha=-1, out=found)
        if self._totals is None:
            torch.baddbmm(before, leaving.mT, found, out=after)
        else:
            torch.bmm(leaving.mT, found, out=after)
            after.addcmul_(before, self._totals[step.chunks])

    def carried(self, step: ChunkStep, leaving: Tensor, state: Tensor, writes: bool) -> Tensor:
        """The state after a step of one chunk, ``[B·H, K, ·]``, given the one before it; without Ũ where it does not write."""
        weights, leaving = self._matrices(self._weights, step), self._leaving(leaving, step)
        if writes:
            assert self._updates is not None
            found = torch.baddbmm(self._matrices(self._updates, step), weights, state, alpha=-1)
        else:
            found = torch.bmm(weights, state).neg_()
        return torch.baddbmm(self._times_total(state, step), leaving.mT, found)

    def retreat(self, step: ChunkStep, leaving: Tensor, grad_states: Tensor, grad_corrected: Tensor) -> None:
        """Turn ∂S of a step's chunks into λ and complete their ∂u, in place, given λ after them."""
        after = grad_states[step.next_slots].flatten(0, -3)
        weights, leaving = self._matrices(self._weights, step), self._leaving(leaving, step)
        if not isinstance(step.chunks, int):
            found = torch.baddbmm(self._matrices(grad_corrected, step), leaving, after)
            own = grad_states[step.slots].flatten(0, -3) + self._times_total(after, step)
            shape = (-1, *grad_corrected.shape[1:3])
            grad_corrected[step.chunks, :, :, : step.size] = found.unflatten(0, shape)
            grad_states[step.slots] = torch.baddbmm(own, weights.mT, found, alpha=-1).unflatten(0, shape)
            return
        found = self._matrices(grad_corrected, step)
        found.baddbmm_(leaving, after)
        own = grad_states[step.slots].flatten(0, -3)
        own.baddbmm_(weights.mT, found, alpha=-1)
        if self._totals is None:
            own.add_(after)
        else:
            own.addcmul_(after, self._totals[step.chunks])

    def carried_back(
        self, step: ChunkStep, leaving: Tensor, grad: Tensor, grad_states: Tensor, grad_corrected: Tensor
    ) -> Tensor:
        """λ before a step of one chunk, ``[B·H, K, V]``, given the one after it; nothing else is changed."""
        weights, leaving = self._matrices(self._weights, step), self._leaving(leaving, step)
        found = torch.baddbmm(self._matrices(grad_corrected, step), leaving, grad)
        own = grad_states[step.slots].flatten(0, -3) + self._times_total(grad, step)
        return torch.baddbmm(own, weights.mT, found, alpha=-1)
