"""Gated DeltaProduct's layer (`deltaproduct`).

Shapes: B batch rows, T tokens of this rank, C channels of the residual stream, H heads, D head dimension, N steps of a token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from longspan.features import unit_length
from longspan.models.gates import StepDecay, WriteStrength
from longspan.models.initial import InitialWeights
from longspan.models.mixers.convolution import ShortConvolution
from longspan.models.mixers.layer import Footprint, LayerMixer, memory_of, operations_of_state, write_state
from longspan.models.mixers.mixer import Context, LayerMemory, operations_of_matrices
from longspan.models.norms import GatedRMSNorm
from longspan.ops.delta.form import DEFAULT_CHUNK_SIZE

if TYPE_CHECKING:
    from longspan.models.config import LinearLlama3Config

NUM_STEPS = 2
"""N, Householder steps of a token: 2 where the paper compares models of language, and the least that can rotate a state."""


class DeltaProductMixer(LayerMixer):
    """o = out(norm_per_head(read(q, write(k, v))) ⊙ silu(gate)): Gated DeltaNet's layer that writes N = 2 times a token.

    Gated DeltaProduct (arXiv 2502.10297): q, and N keys and values a token, through a convolution of 4 taps and silu, q and k then
    of length 1; values and gates of 2 D channels a head; strengths 2 σ(x W), one per step and head, so that a step may reflect, and
    decays −e^A_log · softplus(x W + dt_bias), one per token and head. (5 + 3 N) H · D · C numbers and those of the small
    projections.

    It remembers ``{"state": [B, H, D, 2 D], "taps": [B, 3, (1 + 3 N) H · D]}``.
    """

    name = "deltaproduct"

    def __init__(self, config: LinearLlama3Config, layer: int) -> None:
        super().__init__(config, layer)
        self.num_heads, self.key_size, self.value_size = config.num_heads, config.size_of_head, 2 * config.size_of_head
        keys, values = self.num_heads * self.key_size, self.num_heads * self.value_size
        self.q_proj = nn.Linear(config.dim, keys, bias=False)
        self.k_proj = nn.Linear(config.dim, NUM_STEPS * keys, bias=False)
        self.v_proj = nn.Linear(config.dim, NUM_STEPS * values, bias=False)
        self.gate_proj = nn.Linear(config.dim, values, bias=False)
        self.convolution = ShortConvolution(keys + NUM_STEPS * (keys + values))
        self.strength = WriteStrength(config.dim, NUM_STEPS * self.num_heads)
        self.dt_proj = nn.Linear(config.dim, self.num_heads, bias=False)
        self.decay = StepDecay(self.num_heads, least_rate=0.0)
        self.norm = GatedRMSNorm(self.value_size, config.norm_eps)
        self.out_proj = nn.Linear(values, config.dim, bias=False)

    def mix(self, x: Tensor, context: Context) -> tuple[Tensor, LayerMemory | None]:
        inputs = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)
        inputs, taps = self.convolution(inputs, context)
        q, k, v = inputs.split([part.out_features for part in (self.q_proj, self.k_proj, self.v_proj)], dim=-1)
        k, v = (part.unflatten(-1, (NUM_STEPS, self.num_heads, -1)) for part in (k, v))
        _, g = self.decay(self.dt_proj(x))
        beta = 2.0 * self.strength(x)["beta"].unflatten(-1, (NUM_STEPS, self.num_heads))
        memory = write_state("gated_delta_product", unit_length(k), v, {"g": g, "beta": beta}, context, self.parallel)
        gate = self.gate_proj(x).unflatten(-1, (self.num_heads, -1))
        read = memory.read(unit_length(q.unflatten(-1, (self.num_heads, -1))))
        out: Tensor = self.out_proj(self.norm(read, gate).flatten(2))
        return out, memory_of(memory, context, taps)

    def init_weights(self, initial: InitialWeights) -> None:
        initial.fill(self, residual=(self.out_proj,))

    def flops_per_token(self, seq_len: int) -> float:
        # Every step reads what it erases and writes, and the token reads once.
        per_product = operations_of_state(self.num_heads, self.key_size, self.value_size) / 2
        return operations_of_matrices(self) + self.convolution.flops_per_token + (2 * NUM_STEPS + 1) * per_product

    def footprint(self) -> Footprint:
        keys, values = self.num_heads * self.key_size, self.num_heads * self.value_size
        state = keys * self.value_size
        # Chunks have as many rows as those of one row per token, and so fewer tokens: more states, counted as numbers of tokens.
        squares = (1 + NUM_STEPS) * DEFAULT_CHUNK_SIZE * self.num_heads
        wide = 9 * keys + 12 * self.num_heads + squares + (NUM_STEPS - 1) * state // DEFAULT_CHUNK_SIZE
        # In bfloat16 the norms of q and k keep copies in float32, and in float32 the convolution's output as a whole.
        return Footprint(14 * keys + 8 * values, wide, state, keys * self.key_size, self.convolution.halo)
