"""Mamba-2's layer (`mamba2`).

Shapes: B batch rows, T tokens of this rank, C channels of the residual stream, H heads of the layer, D head dimension, N state
size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspan.dtypes import at_least_float32
from longspan.models.gates import StepDecay
from longspan.models.initial import InitialWeights
from longspan.models.mixers.convolution import ShortConvolution
from longspan.models.mixers.layer import Footprint, LayerMixer, memory_of, operations_of_state, write_state
from longspan.models.mixers.mixer import Context, LayerMemory, operations_of_matrices
from longspan.models.norms import RMSNorm

if TYPE_CHECKING:
    from longspan.models.config import LinearLlama3Config

STATE_SIZE = 128
"""N, of the paper's language models: channels of B and C, which all heads share (one group)."""
EXPAND = 2
"""Inner channels per channel of the heads of a config."""


class SkipWeights(nn.Module):
    """D: how much of its own input a head passes on, one at first."""

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.D = nn.Parameter(torch.empty(num_heads))

    def reset_parameters(self) -> None:
        """Set them to one."""
        nn.init.ones_(self.D)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """y + D x of ``[B, T, H, D]``, float32 or wider."""
        return at_least_float32(y) + at_least_float32(self.D).unsqueeze(-1) * x


class Mamba2Mixer(LayerMixer):
    """o = out(norm((S C + D x) ⊙ silu(z))), S decaying by e^(−Δ e^A_log) and gathering Δ x Bᵀ; x, B and C convolved.

    Mamba-2's layer (arXiv 2405.21060, section 7): one projection makes z, x, B, C and the logits of Δ; a convolution of 4 taps with
    bias and silu over x, B and C; twice as many heads as the config says, of `head_dim` channels each; one group of B and C with
    128 channels; a norm over all channels behind the gate. About 6 C² numbers where the config's heads have C channels. The
    paper's model has no feed-forward layers; here the block keeps its own.

    It remembers ``{"state": [B, H, N, D], "taps": [B, 3, H · D + 2 N]}``.
    """

    name = "mamba2"

    def __init__(self, config: LinearLlama3Config, layer: int) -> None:
        super().__init__(config, layer)
        self.num_heads, self.head_dim = EXPAND * config.num_heads, config.size_of_head
        inner = self.num_heads * self.head_dim
        self.convolved = (inner, STATE_SIZE, STATE_SIZE)
        self.in_proj = nn.Linear(config.dim, inner + sum(self.convolved) + self.num_heads, bias=False)
        self.convolution = ShortConvolution(sum(self.convolved), bias=True)
        self.decay = StepDecay(self.num_heads)
        self.skip = SkipWeights(self.num_heads)
        self.norm = RMSNorm(inner, config.norm_eps)
        self.out_proj = nn.Linear(inner, config.dim, bias=False)

    def mix(self, x: Tensor, context: Context) -> tuple[Tensor, LayerMemory | None]:
        sizes = (self.convolved[0], sum(self.convolved), self.num_heads)
        z, inputs, dt = self.in_proj(x).split(sizes, dim=-1)
        inputs, taps = self.convolution(inputs, context)
        values, b, c = inputs.split(self.convolved, dim=-1)
        values = values.unflatten(-1, (self.num_heads, self.head_dim))
        steps, g = self.decay(dt)
        written = (values * steps.unsqueeze(-1)).to(values.dtype)
        memory = write_state("simple_gla", b.unsqueeze(2), written, {"g": g}, context, self.parallel)
        y = self.skip(memory.read(c.unsqueeze(2), scale=1.0), values).flatten(2)
        out: Tensor = self.out_proj(self.norm(y * F.silu(at_least_float32(z))).to(values.dtype))
        return out, memory_of(memory, context, taps)

    def init_weights(self, initial: InitialWeights) -> None:
        initial.fill(self, residual=(self.out_proj,))

    def flops_per_token(self, seq_len: int) -> float:
        state = operations_of_state(self.num_heads, STATE_SIZE, self.head_dim)
        return operations_of_matrices(self) + self.convolution.flops_per_token + state

    def footprint(self) -> Footprint:
        inner, convolved = self.num_heads * self.head_dim, sum(self.convolved)
        narrow = self.in_proj.out_features + convolved
        wide = 6 * inner + 3 * self.num_heads + 1
        return Footprint(narrow, wide, state=inner * STATE_SIZE, halo=self.convolution.halo)
