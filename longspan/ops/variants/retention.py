"""Retention: a constant decay per head (RetNet, arXiv 2307.08621; Lightning Attention, arXiv 2401.04658).

S_t = γ_h S_{t-1} + k_t v_tᵀ,      o_t = scale · S_tᵀ q_t,      γ_h = e^{log_decay_h}
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.ops.decay import DecayVariant
from longspan.ops.gates import DecayKind, Gates


def recurrent(
    q: Tensor, k: Tensor, v: Tensor, gates: Gates, scale: float, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    """The definition; gates: log_decay ``[H]``."""
    decay = gates["log_decay"].exp()[:, None, None]
    state, outputs = initial_state, []
    for t in range(q.shape[1]):
        state = decay * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append(scale * (q[:, t, :, None, :] @ state).squeeze(-2))
    return torch.stack(outputs, dim=1), state


RETENTION = DecayVariant(
    name="retention",
    decay=DecayKind.HEAD,
    recurrent_form=recurrent,
)
