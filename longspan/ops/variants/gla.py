"""Gated linear attention: one log decay per token and key channel (GLA, arXiv 2312.06635; HGRN2, arXiv 2404.07904).

    S_t = Diag(e^{g_t}) S_{t-1} + k_t v_tᵀ,      o_t = scale · S_tᵀ q_t

HGRN2 is this operator with k = 1 − f and g = log f, f the forget gate of a key channel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.ops.decay import DecayVariant
from longspan.ops.gates import DecayKind, Gates


def recurrent(
    q: Tensor, k: Tensor, v: Tensor, gates: Gates, scale: float, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    """The definition; gates: g ``[B, T, H, K]``, log decays."""
    state, outputs = initial_state, []
    for t in range(q.shape[1]):
        state = gates["g"][:, t, :, :, None].exp() * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append(scale * (q[:, t, :, None, :] @ state).squeeze(-2))
    return torch.stack(outputs, dim=1), state


GLA = DecayVariant(
    name="gla",
    decay=DecayKind.CHANNEL,
    recurrent_form=recurrent,
)
