"""The gated delta rule with several steps per token (Gated DeltaProduct, arXiv 2502.10297).

    S_{t,0} = e^{g_t} S_{t-1}        S_{t,n} = (I − β_{t,n} k_{t,n} k_{t,n}ᵀ) S_{t,n-1} + β_{t,n} k_{t,n} v_{t,n}ᵀ
    S_t = S_{t,N}                    o_t = scale · S_tᵀ q_t

The transition of a token is a decay times a product of N generalized Householder matrices, which for N > 1 and β up to 2 may be a
rotation. In the chunk form a token has N rows that write, of which the first decays, and one that reads.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from longspan.layout import SequenceLayout
from longspan.ops.delta.form import DeltaChunkForm, begin_call, householder_steps
from longspan.ops.gates import DecayKind, Gate, Gates
from longspan.ops.variants.variant import ChunkForm, Variant
from longspan.state import Dense


class GatedDeltaProduct(Variant):
    """The gated delta rule with N steps per token."""

    name = "gated_delta_product"
    decay = DecayKind.TOKEN
    gates = (*decay.gates, Gate("beta", "BTNH"))
    transition = Dense
    has_steps = True

    def recurrent(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, scale: float, initial_state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The definition; k ``[B, T, N, H, K]``; v ``[B, T, N, H, V]``; gates: g ``[B, T, H]``; beta ``[B, T, N, H]``."""
        state, outputs = initial_state, []
        for t in range(q.shape[1]):
            state = gates["g"][:, t, :, None, None].exp() * state
            for n in range(k.shape[2]):
                key, value = k[:, t, n, :, :, None], v[:, t, n, :, None, :]
                state = state + gates["beta"][:, t, n, :, None, None] * key * (value - key.mT @ state)
            outputs.append(scale * (q[:, t, :, None, :] @ state).squeeze(-2))
        return torch.stack(outputs, dim=1), state

    def prepare(
        self, k: Tensor, v: Tensor, gates: Gates, layout: SequenceLayout, chunk_size: int | None, backend: str
    ) -> ChunkForm:
        num_steps = k.shape[2]
        # [B, T, H] as [B, T, N, H], zero but for a token's first row.
        g = torch.nn.functional.pad(gates["g"].unsqueeze(2), (0, 0, 0, num_steps - 1)).flatten(1, 2)
        decays = replace(self.decay.of(gates), values=g)
        call = begin_call(k.flatten(1, 2), v.flatten(1, 2), decays, layout, chunk_size, num_steps)
        return DeltaChunkForm(call, decays, householder_steps(gates["beta"]))


GATED_DELTA_PRODUCT = GatedDeltaProduct()
