"""Retention: a constant decay per head (RetNet, arXiv 2307.08621; Lightning Attention, arXiv 2401.04658).

S_t = γ_h S_{t-1} + k_t v_tᵀ,      o_t = scale · S_tᵀ q_t,      γ_h = e^{log_decay_h}
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.ops.decay.chunk_form import DecayVariant
from longspan.ops.decay.factors import Factors, constant_factors
from longspan.ops.tiling import Tiling
from longspan.ops.variants.variant import Gate, Gates
from longspan.state import HeadDecay


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


def _factors(gates: Gates, tiling: Tiling, num_heads: int, dtype: torch.dtype, state_dtype: torch.dtype) -> Factors:
    return constant_factors(gates["log_decay"], tiling, dtype, state_dtype)


RETENTION = DecayVariant(
    name="retention",
    transition=HeadDecay,
    gates=(Gate("log_decay", "H", is_log_decay=True, differentiable=False),),
    recurrent_form=recurrent,
    factors=_factors,
    backends=("torch", "triton"),
)
