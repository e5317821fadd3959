"""Kimi Delta Attention (`kda`).

Shapes: B batch rows, T tokens of this rank, C channels of the residual stream, H heads, D head dimension.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from longspan.features import unit_length
from longspan.models.gates import StepDecay, WriteStrength
from longspan.models.initial import InitialWeights
from longspan.models.mixers.convolution import ShortConvolution
from longspan.models.mixers.layer import (
    Footprint,
    LayerMixer,
    memory_of,
    operations_of_state,
    squares_of_delta_rule,
    write_state,
)
from longspan.models.mixers.mixer import Context, LayerMemory, operations_of_matrices
from longspan.models.norms import GatedRMSNorm

if TYPE_CHECKING:
    from longspan.models.config import LinearLlama3Config


class KDAMixer(LayerMixer):
    """o = out(norm_per_head(read(q, write(k, v))) ⊙ σ(gate)): DeltaNet's layer whose state decays by key channels.

    Kimi Linear's layer (arXiv 2510.26692): q, k and v through a convolution of 4 taps and silu, q and k then of length 1;
    decays −e^A_log · softplus(x W₁ W₂ + dt_bias), one per token and key channel, and the output's gate x W₁ W₂, both through a rank
    of D, the size of a head; strengths σ(x W). 4 C² + 4 D C numbers and those of β and the convolution where H · D = C.

    It remembers ``{"state": [B, H, D, D], "taps": [B, 3, 3 H · D]}``.
    """

    name = "kda"

    def __init__(self, config: LinearLlama3Config, layer: int) -> None:
        super().__init__(config, layer)
        self.num_heads, self.head_dim = config.num_heads, config.size_of_head
        inner = self.num_heads * self.head_dim
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(config.dim, inner, bias=False) for _ in range(3))
        self.convolution = ShortConvolution(3 * inner)
        self.strength = WriteStrength(config.dim, self.num_heads)
        self.dt_proj, self.gate_proj = (
            nn.Sequential(nn.Linear(config.dim, self.head_dim, bias=False), nn.Linear(self.head_dim, inner, bias=False))
            for _ in range(2)
        )
        self.decay = StepDecay(self.num_heads, self.head_dim)
        self.norm = GatedRMSNorm(self.head_dim, config.norm_eps, "sigmoid")
        self.out_proj = nn.Linear(inner, config.dim, bias=False)

    def mix(self, x: Tensor, context: Context) -> tuple[Tensor, LayerMemory | None]:
        inputs = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)
        inputs, taps = self.convolution(inputs, context)
        q, k, v = inputs.unflatten(-1, (3 * self.num_heads, self.head_dim)).chunk(3, dim=2)
        _, g = self.decay(self.dt_proj(x))
        memory = write_state("kda", unit_length(k), v, {"g": g, **self.strength(x)}, context, self.parallel)
        gate = self.gate_proj(x).unflatten(-1, (self.num_heads, self.head_dim))
        out: Tensor = self.out_proj(self.norm(memory.read(unit_length(q)), gate).flatten(2))
        return out, memory_of(memory, context, taps)

    def init_weights(self, initial: InitialWeights) -> None:
        initial.fill(self, residual=(self.out_proj,))

    def flops_per_token(self, seq_len: int) -> float:
        state = operations_of_state(self.num_heads, self.head_dim, self.head_dim, erases=True)
        return operations_of_matrices(self) + self.convolution.flops_per_token + state

    def footprint(self) -> Footprint:
        inner = self.num_heads * self.head_dim
        wide = 12 * inner + 4 * self.num_heads + squares_of_delta_rule(self.num_heads)
        state = inner * self.head_dim
        return Footprint(7 * inner + 2 * self.head_dim, wide, state, transition=state, halo=self.convolution.halo)
