"""Basic linear attention: nothing decays (Transformers are RNNs, arXiv 2006.16236).

S_t = S_{t-1} + k_t v_tᵀ,      o_t = scale · S_tᵀ q_t
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.ops.decay import DecayVariant
from longspan.ops.gates import DecayKind, Gates


def recurrent(
    q: Tensor, k: Tensor, v: Tensor, gates: Gates, scale: float, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    """The definition; no gates."""
    state, outputs = initial_state, []
    for t in range(q.shape[1]):
        state = state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append(scale * (q[:, t, :, None, :] @ state).squeeze(-2))
    return torch.stack(outputs, dim=1), state


LINEAR_ATTENTION = DecayVariant(
    name="linear_attention",
    decay=DecayKind.NONE,
    recurrent_form=recurrent,
)
