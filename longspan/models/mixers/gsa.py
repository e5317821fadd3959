"""Gated slot attention (`gsa`).

Shapes: B batch rows, T tokens of this rank, C channels of the residual stream, H heads, D head dimension, M slots of a head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspan.features import gla_log_decay
from longspan.models.initial import InitialWeights
from longspan.models.mixers.layer import Footprint, LayerMixer, memory_of, operations_of_state, write_state
from longspan.models.mixers.mixer import Context, LayerMemory, operations_of_matrices
from longspan.models.norms import RMSNorm

if TYPE_CHECKING:
    from longspan.models.config import LinearLlama3Config

NUM_SLOTS = 64
"""M, as in the paper's models of language."""
DAMPING = 8.0
"""τ: forget gates are σ(·)^(1/τ)."""


class GSAMixer(LayerMixer):
    """o = out(norm(silu(read(silu(q), write(silu(k), silu(v)))))), of M = 64 slots that forget by α = σ(forget)^(1/8), scale 1.

    GSA's layer (arXiv 2409.07146): a token writes into each slot what the slot forgets, 1 − α, and reads them by a softmax over the
    slots; one norm goes over all channels, and no gate behind it. 4 C² + 64 H C numbers where H · D = C, and the norm's.

    It remembers the slots' keys and values beside each other, ``{"state": [B, H, M, 2 D]}``.
    """

    name = "gsa"

    def __init__(self, config: LinearLlama3Config, layer: int) -> None:
        super().__init__(config, layer)
        self.num_heads, self.head_dim = config.num_heads, config.size_of_head
        inner = self.num_heads * self.head_dim
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(config.dim, inner, bias=False) for _ in range(3))
        self.forget_proj = nn.Linear(config.dim, self.num_heads * NUM_SLOTS, bias=False)
        self.norm = RMSNorm(inner, config.norm_eps)
        self.out_proj = nn.Linear(inner, config.dim, bias=False)

    def mix(self, x: Tensor, context: Context) -> tuple[Tensor, LayerMemory | None]:
        k, v = (self._heads(F.silu(part(x))) for part in (self.k_proj, self.v_proj))
        g = gla_log_decay(self._heads(self.forget_proj(x)), DAMPING)
        gates = {"s": -torch.expm1(g), "g": g}
        memory = write_state("gated_slot_attention", k, v, gates, context, self.parallel)
        read = memory.read(self._heads(F.silu(self.q_proj(x))), scale=1.0)
        out: Tensor = self.out_proj(self.norm(F.silu(read.flatten(2))))
        return out, memory_of(memory, context)

    def init_weights(self, initial: InitialWeights) -> None:
        initial.fill(self, residual=(self.out_proj,))

    def flops_per_token(self, seq_len: int) -> float:
        # Keys and values are written into the slots, and read from them.
        return operations_of_matrices(self) + operations_of_state(self.num_heads, NUM_SLOTS, 2 * self.head_dim)

    def footprint(self) -> Footprint:
        inner, slots = self.num_heads * self.head_dim, self.num_heads * NUM_SLOTS
        return Footprint(narrow=8 * inner, wide=2 * inner + 6 * slots + 1, state=2 * slots * self.head_dim)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))
