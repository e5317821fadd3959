"""Simple gated linear attention: one log decay per token and head (Mamba-2's SSD, arXiv 2405.21060; simple GLA in 2312.06635).

S_t = e^{g_t} S_{t-1} + k_t v_tᵀ,      o_t = scale · S_tᵀ q_t
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.ops.decay import DecayVariant
from longspan.ops.gates import DecayKind, Gates


def recurrent(
    q: Tensor, k: Tensor, v: Tensor, gates: Gates, scale: float, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    """The definition; gates: g ``[B, T, H]``, log decays."""
    state, outputs = initial_state, []
    for t in range(q.shape[1]):
        state = gates["g"][:, t, :, None, None].exp() * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append(scale * (q[:, t, :, None, :] @ state).squeeze(-2))
    return torch.stack(outputs, dim=1), state


SIMPLE_GLA = DecayVariant(
    name="simple_gla",
    decay=DecayKind.TOKEN,
    recurrent_form=recurrent,
)
