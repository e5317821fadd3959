"""The chunk form of gated slot attention: states written as those of a decay, and read twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longspan.ops.decay.form import DecayChunkForm
from longspan.ops.decay.read import DecayRead
from longspan.ops.slots.scores import SlotScores
from longspan.ops.variants.variant import ChunkForm, SecondPass
from longspan.state import Transition


@dataclass
class SlotChunkForm(ChunkForm):
    """The chunk form, from that of `gla` which writes s with the values (k, v).

    s: ``[B, T, H, M]`` in the dtype of k. keys_and_values: ``[B, T, H, K + V]``.
    """

    of_decay: DecayChunkForm
    s: Tensor
    keys_and_values: Tensor

    def write(
        self, k: Tensor, v: Tensor, start_states: Tensor | None, end_pieces: Sequence[int], sent_pieces: Sequence[int]
    ) -> Tensor:
        return self.of_decay.write(self.s, self.keys_and_values, start_states, end_pieces, sent_pieces)

    def read(self, q: Tensor, wait: Callable[[], Tensor | None], scale: float, overlapped: bool) -> Tensor:
        s, both, states = self.of_decay.written
        sizes = [q.shape[-1], both.shape[-1] - q.shape[-1]]
        (k, v), (of_keys, of_values) = both.split(sizes, dim=-1), states.split(sizes, dim=-1)
        g, call = self.of_decay.decays.in_time, replace(self.of_decay.call, scale=scale)
        scores: Tensor
        if overlapped:
            scores = SlotScores.apply(q, s, k, g, None, None, call)
            keys, values = _halves(wait(), sizes)
            scores = scores + SlotScores.apply(q, None, None, g, of_keys, keys, call)
        else:
            keys, values = _halves(wait(), sizes)
            scores = SlotScores.apply(q, s, k, g, of_keys, keys, call)
        weights = torch.softmax(scores, dim=-1).to(q.dtype)
        o: Tensor
        o = DecayRead.apply(weights, s, v, g, of_values, values, None, replace(call, scale=1.0), sizes[1])
        return o

    @property
    def second_pass(self) -> SecondPass | None:
        return SecondPass(self.of_decay.call.tiling.chunk_size, num_launches=12)

    def final_states(self, pieces: Sequence[int], rows: Sequence[int], incoming: Tensor | None) -> Tensor:
        return self.of_decay.final_states(pieces, rows, incoming)

    def transition(self, ranges: Sequence[tuple[int, int]]) -> Transition:
        return self.of_decay.transition(ranges)


def _halves(states: Tensor | None, sizes: list[int]) -> tuple[Tensor | None, Tensor | None]:
    """K̃ and Ṽ of what arrived, ``[num_segments, B, H, M, K + V]``."""
    if states is None:
        return None, None
    keys, values = states.split(sizes, dim=-1)
    return keys, values
