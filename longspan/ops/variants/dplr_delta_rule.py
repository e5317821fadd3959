"""The delta rule with a diagonal plus low-rank transition (RWKV-7, arXiv 2503.14456, its generalized delta rule).

    S_t = (Diag(e^{g_t}) + b_t a_tᵀ) S_{t-1} + k_t v_tᵀ,      o_t = scale · S_tᵀ q_t

What a_t reads of the state before the token, b_t writes. RWKV-7 is the case a = −κ̂, b = κ̂ ⊙ α: see `longspan.rwkv7`. The delta rule
is a = −k, b = β k with β k for k; there a reads after the decay (`longspan.ops.variants.kda`), here before it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.layout import SequenceLayout
from longspan.ops.dplr.form import prepare_low_rank
from longspan.ops.gates import DecayKind, Gate, Gates
from longspan.ops.variants.variant import ChunkForm, Variant
from longspan.state import Dense


class DplrDeltaRule(Variant):
    """The delta rule with a diagonal plus low-rank transition."""

    name = "dplr_delta_rule"
    decay = DecayKind.CHANNEL
    gates = (Gate("a", "BTHK"), Gate("b", "BTHK"), *decay.gates)
    transition = Dense

    def recurrent(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, scale: float, initial_state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The definition; gates: a, b ``[B, T, H, K]``; g ``[B, T, H, K]``, log decays."""
        state, outputs = initial_state, []
        for t in range(q.shape[1]):
            a, b = gates["a"][:, t, :, None, :], gates["b"][:, t, :, :, None]
            decayed = gates["g"][:, t, :, :, None].exp() * state
            state = decayed + b * (a @ state) + k[:, t, :, :, None] * v[:, t, :, None, :]
            outputs.append(scale * (q[:, t, :, None, :] @ state).squeeze(-2))
        return torch.stack(outputs, dim=1), state

    def prepare(
        self, k: Tensor, v: Tensor, gates: Gates, layout: SequenceLayout, chunk_size: int | None, backend: str
    ) -> ChunkForm:
        decays = self.decay.of(gates)
        return prepare_low_rank(v, gates["a"], gates["b"], decays, layout, chunk_size, writes_apart=True)


DPLR_DELTA_RULE = DplrDeltaRule()
