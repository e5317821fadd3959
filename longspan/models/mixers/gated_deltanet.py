"""Gated DeltaNet's layer (`gated_deltanet`).

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


class GatedDeltaNetMixer(LayerMixer):
    """o = out(norm_per_head(read(q, write(k, v))) ⊙ silu(gate)): DeltaNet's layer whose state decays by Mamba-2's numbers.

    Gated DeltaNet (arXiv 2412.06464): q, k and v through a convolution of 4 taps and silu, q and k then of length 1;
    values and gates of 2 D channels a head; decays −e^A_log · softplus(x W + dt_bias) and strengths σ(x W), one per token and head.
    8 H · D · C numbers and those of the small projections: the paper has heads of ¾ C channels together, and so 6 C².

    It remembers ``{"state": [B, H, D, 2 D], "taps": [B, 3, 4 H · D]}``.
    """

    name = "gated_deltanet"

    def __init__(self, config: LinearLlama3Config, layer: int) -> None:
        super().__init__(config, layer)
        self.num_heads, self.key_size, self.value_size = config.num_heads, config.size_of_head, 2 * config.size_of_head
        keys, values = self.num_heads * self.key_size, self.num_heads * self.value_size
        self.q_proj, self.k_proj = (nn.Linear(config.dim, keys, bias=False) for _ in range(2))
        self.v_proj, self.gate_proj = (nn.Linear(config.dim, values, bias=False) for _ in range(2))
        self.convolution = ShortConvolution(2 * keys + values)
        self.strength = WriteStrength(config.dim, self.num_heads)
        self.dt_proj = nn.Linear(config.dim, self.num_heads, bias=False)
        self.decay = StepDecay(self.num_heads, least_rate=0.0)
        self.norm = GatedRMSNorm(self.value_size, config.norm_eps)
        self.out_proj = nn.Linear(values, config.dim, bias=False)

    def mix(self, x: Tensor, context: Context) -> tuple[Tensor, LayerMemory | None]:
        inputs = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)
        inputs, taps = self.convolution(inputs, context)
        keys = self.num_heads * self.key_size
        q, k, v = (self._heads(part) for part in inputs.split((keys, keys, self.num_heads * self.value_size), dim=-1))
        _, g = self.decay(self.dt_proj(x))
        gates = {"g": g, **self.strength(x)}
        memory = write_state("gated_delta_rule", unit_length(k), v, gates, context, self.parallel)
        gate = self._heads(self.gate_proj(x))
        out: Tensor = self.out_proj(self.norm(memory.read(unit_length(q)), gate).flatten(2))
        return out, memory_of(memory, context, taps)

    def init_weights(self, initial: InitialWeights) -> None:
        initial.fill(self, residual=(self.out_proj,))

    def flops_per_token(self, seq_len: int) -> float:
        state = operations_of_state(self.num_heads, self.key_size, self.value_size, erases=True)
        return operations_of_matrices(self) + self.convolution.flops_per_token + state

    def footprint(self) -> Footprint:
        keys, values = self.num_heads * self.key_size, self.num_heads * self.value_size
        narrow = 4 * keys + 5 * values
        wide = 5 * keys + 3 * values + 7 * self.num_heads + squares_of_delta_rule(self.num_heads)
        transition = keys * self.key_size
        return Footprint(narrow, wide, keys * self.value_size, transition, self.convolution.halo)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))
