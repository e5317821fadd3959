"""Simple gated linear attention: one log decay per token and head (Mamba-2's SSD, arXiv 2405.21060; simple GLA in 2312.06635).

S_t = e^{g_t} S_{t-1} + k_t v_tᵀ,      o_t = scale · S_tᵀ q_t
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.ops.decay.chunk_form import DecayVariant
from longspan.ops.decay.factors import Factors, token_factors
from longspan.ops.tiling import Tiling
from longspan.ops.variants.variant import Gate, Gates
from longspan.state import ScalarDecay


def recurrent(
    q: Tensor, k: Tensor, v: Tensor, gates: Gates, scale: float, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    """The definition; gates: g ``[B, T, H]``, log decays."""
    state, outputs = initial_state, []
    for t in range(q.shape[1]):
        state = gates["g"][:, t, :, None, None].exp() * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append(scale * (q[:, t, :, None, :] @ state).squeeze(-2))
    return torch.stack(outputs, dim=1), state


def _factors(gates: Gates, tiling: Tiling, num_heads: int, dtype: torch.dtype, state_dtype: torch.dtype) -> Factors:
    return token_factors(gates["g"], tiling, dtype, state_dtype)


SIMPLE_GLA = DecayVariant(
    name="simple_gla",
    transition=ScalarDecay,
    gates=(Gate("g", "BTH", is_log_decay=True),),
    recurrent_form=recurrent,
    factors=_factors,
    backends=("torch", "triton"),
)
