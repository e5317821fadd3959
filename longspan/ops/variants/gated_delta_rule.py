"""The delta rule with a decay per token and head (Gated DeltaNet, arXiv 2412.06464).

S_t = e^{g_t} (I − β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ,      o_t = scale · S_tᵀ q_t
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.ops.delta import DeltaVariant
from longspan.ops.gates import DecayKind, Gates


def recurrent(
    q: Tensor, k: Tensor, v: Tensor, gates: Gates, scale: float, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    """The definition; gates: g ``[B, T, H]``, log decays; beta ``[B, T, H]``."""
    state, outputs = initial_state, []
    for t in range(q.shape[1]):
        key, value = k[:, t, :, :, None], v[:, t, :, None, :]
        state = gates["g"][:, t, :, None, None].exp() * state
        state = state + gates["beta"][:, t, :, None, None] * key * (value - key.mT @ state)
        outputs.append(scale * (q[:, t, :, None, :] @ state).squeeze(-2))
    return torch.stack(outputs, dim=1), state


GATED_DELTA_RULE = DeltaVariant(
    name="gated_delta_rule",
    decay=DecayKind.TOKEN,
    recurrent_form=recurrent,
)
