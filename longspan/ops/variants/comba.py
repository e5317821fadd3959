"""The delta rule with a feedback of its own: what is taken off is read by another key (Comba, arXiv 2506.02475).

    S_t = e^{g_t} S_{t-1} + β_t k_t (v_t − S_{t-1}ᵀ p_t)ᵀ,      o_t = scale · S_tᵀ q_t

p_t reads the state before the token, which its decay has not reached: the state feedback of Comba's scalar plus low-rank
transition, with p = b k and a learned b per head in its layer. The layer's output feedback, q − d k for q, is the caller's to make.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.layout import SequenceLayout
from longspan.ops.dplr.form import prepare_low_rank
from longspan.ops.gates import DecayKind, Gate, Gates
from longspan.ops.variants.variant import ChunkForm, Variant
from longspan.state import Dense


class Comba(Variant):
    """The delta rule with a feedback of its own."""

    name = "comba"
    decay = DecayKind.TOKEN
    gates = (Gate("p", "BTHK"), *decay.gates, Gate("beta", "BTH"))
    transition = Dense

    def recurrent(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, scale: float, initial_state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The definition; gates: p ``[B, T, H, K]``; g ``[B, T, H]``, log decays; beta ``[B, T, H]``."""
        state, outputs = initial_state, []
        for t in range(q.shape[1]):
            error = v[:, t, :, None, :] - gates["p"][:, t, :, None, :] @ state
            written = gates["beta"][:, t, :, None, None] * k[:, t, :, :, None] * error
            state = gates["g"][:, t, :, None, None].exp() * state + written
            outputs.append(scale * (q[:, t, :, None, :] @ state).squeeze(-2))
        return torch.stack(outputs, dim=1), state

    def prepare(
        self, k: Tensor, v: Tensor, gates: Gates, layout: SequenceLayout, chunk_size: int | None, backend: str
    ) -> ChunkForm:
        b = gates["beta"].unsqueeze(-1) * k.repeat_interleave(v.shape[2] // k.shape[2], dim=2)
        return prepare_low_rank(v, -gates["p"], b, self.decay.of(gates), layout, chunk_size, writes_apart=False)


COMBA = Comba()
