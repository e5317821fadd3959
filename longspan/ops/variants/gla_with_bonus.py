"""Gated linear attention that reads before it decays, and the token itself with a weight (RWKV-6, arXiv 2404.05892).

    o_t = scale · (S_{t-1} + Diag(u) k_t v_tᵀ)ᵀ q_t,      S_t = Diag(e^{g_t}) S_{t-1} + k_t v_tᵀ

S_{t-1} is what the token before has left, so it is read at that token, with this one's query: `gla` does the rest. The first token
of a piece reads the state that enters it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.dtypes import accumulation_dtype
from longspan.layout import SequenceLayout
from longspan.layout.rows import index_on
from longspan.ops.gates import DecayKind, Gate, Gates
from longspan.ops.variants.gla import GLA
from longspan.ops.variants.variant import ChunkForm, SecondPass, Variant
from longspan.state import Transition


class GlaWithBonus(Variant):
    """Gated linear attention of what was before the token, and of the token with the weights u ``[H, K]``."""

    name = "gla_with_bonus"
    decay = DecayKind.CHANNEL
    gates = (*decay.gates, Gate("u", "HK"))
    backends = GLA.backends

    def recurrent(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, scale: float, initial_state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The definition; gates: g ``[B, T, H, K]``, log decays; u ``[H, K]``."""
        state, outputs = initial_state, []
        for t in range(q.shape[1]):
            written = k[:, t, :, :, None] * v[:, t, :, None, :]
            seen = state + gates["u"][:, :, None] * written
            outputs.append(scale * (q[:, t, :, None, :] @ seen).squeeze(-2))
            state = gates["g"][:, t, :, :, None].exp() * state + written
        return torch.stack(outputs, dim=1), state

    def prepare(
        self, k: Tensor, v: Tensor, gates: Gates, layout: SequenceLayout, chunk_size: int | None, backend: str
    ) -> ChunkForm:
        return _BonusForm(GLA.prepare(k, v, {"g": gates["g"]}, layout, chunk_size, backend), layout, gates["u"])


@dataclass
class _BonusForm(ChunkForm):
    """The chunk form, from that of `gla`."""

    of_gla: ChunkForm
    layout: SequenceLayout
    u: Tensor
    _written: tuple[Tensor, Tensor, Tensor | None] | None = None

    def write(
        self, k: Tensor, v: Tensor, start_states: Tensor | None, end_pieces: Sequence[int], sent_pieces: Sequence[int]
    ) -> Tensor:
        self._written = k, v, start_states
        return self.of_gla.write(k, v, start_states, end_pieces, sent_pieces)

    def read(self, q: Tensor, wait: Callable[[], Tensor | None], scale: float, overlapped: bool) -> Tensor:
        assert self._written is not None
        k, v, start_states = self._written
        arrived: list[Tensor | None] = []

        def waited() -> Tensor | None:
            arrived.append(wait())
            return arrived[0]

        pieces, num_tokens = self.layout.pieces, q.shape[1]
        after, before = (_tokens_beside(self.layout, num_tokens, step, q.device) for step in (1, -1))
        # What is read after a piece's last token belongs to nobody.
        last = index_on(self.layout, [piece.stop - 1 for piece in pieces], q.device)
        first = index_on(self.layout, [piece.start for piece in pieces], q.device)
        query = q.index_select(1, after).index_fill(1, last, 0.0)
        read = self.of_gla.read(query, waited, scale, overlapped).index_select(1, before)
        entering = self._entering(q, v, start_states, arrived[0])
        of_first = _repeated(q.index_select(1, first), v).movedim(1, 0).unsqueeze(-2).to(entering.dtype) @ entering
        read = read.index_copy(1, first, (scale * of_first).squeeze(-2).movedim(0, 1).to(read.dtype))
        weight = (_repeated(q, v) * _repeated(k, v) * self.u).sum(-1, keepdim=True) * scale
        return read + (weight * v).to(read.dtype)

    def _entering(self, q: Tensor, v: Tensor, start_states: Tensor | None, incoming: Tensor | None) -> Tensor:
        """The state that enters each piece, ``[num_pieces, B, H, K, V]``."""
        nothing = torch.zeros(
            q.shape[0], *v.shape[2:3], q.shape[3], v.shape[3], dtype=accumulation_dtype(q.dtype), device=q.device
        )
        states, row = [], 0
        for piece in self.layout.pieces:
            source = start_states[row] if piece.starts_document and start_states is not None else None
            if not piece.starts_document and incoming is not None:
                source = incoming[piece.segment]
            row += piece.starts_document
            states.append(nothing if source is None else source)
        return torch.stack(states)

    @property
    def second_pass(self) -> SecondPass | None:
        return self.of_gla.second_pass

    def final_states(self, pieces: Sequence[int], rows: Sequence[int], incoming: Tensor | None) -> Tensor:
        return self.of_gla.final_states(pieces, rows, incoming)

    def transition(self, ranges: Sequence[tuple[int, int]]) -> Transition:
        return self.of_gla.transition(ranges)


def _tokens_beside(layout: SequenceLayout, num_tokens: int, step: int, device: torch.device) -> Tensor:
    """For each local token the number of the one `step` further, or of itself at the end; built once for a layout."""

    def build() -> Tensor:
        return (torch.arange(num_tokens) + step).clamp(0, num_tokens - 1)

    return layout.on_device(("token beside", step), device, build)


def _repeated(x: Tensor, v: Tensor) -> Tensor:
    """``x [B, T, H_k, K]`` with the heads of v."""
    return x if x.shape[2] == v.shape[2] else x.repeat_interleave(v.shape[2] // x.shape[2], dim=2)


GLA_WITH_BONUS = GlaWithBonus()
