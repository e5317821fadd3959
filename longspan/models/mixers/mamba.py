"""Mamba's layer (`mamba`).

Shapes: B batch rows, T tokens of this rank, C channels of the residual stream, E inner channels, N numbers of a state per channel,
R rank of the steps.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspan.attention.selective_scan import selective_scan
from longspan.dtypes import at_least_float32
from longspan.models.initial import DrawnModule, InitialWeights
from longspan.models.mixers.convolution import ShortConvolution
from longspan.models.mixers.layer import Footprint, LayerMixer
from longspan.models.mixers.mixer import Context, LayerMemory, operations_of_matrices

if TYPE_CHECKING:
    from longspan.models.config import LinearLlama3Config

STATE_SIZE = 16
"""N of the paper."""
EXPAND = 2
"""Inner channels per channel of the heads of a config."""
CHANNELS_PER_RANK = 16
"""The rank of the steps is the width of the model divided by this, rounded up."""


class StepProjection(DrawnModule, nn.Linear):
    """What makes the logits of a step for each channel of R numbers of a token (arXiv 2312.00752, section 3.6).

    The matrix starts uniform within ±1/√R, and the bias so that steps are 0.001 to 0.1, uniform in their logarithm, where the
    matrix gives 0: as in the code of Mamba's authors.
    """

    def draw_parameters(self, generator: torch.Generator) -> None:
        """The matrix, then the bias."""
        bound = self.weight.shape[1] ** -0.5
        self.weight.copy_(torch.empty(self.weight.shape).uniform_(-bound, bound, generator=generator))
        exponents = torch.empty(self.bias.shape).uniform_(math.log(1e-3), math.log(1e-1), generator=generator)
        steps = exponents.double().exp()
        # The inverse of softplus.
        self.bias.copy_(steps + torch.log(-torch.expm1(-steps)))

    def forward(self, input: Tensor) -> Tensor:
        """``[B, T, E]`` of ``[B, T, R]``, without the bias, which the scan adds in float32."""
        return F.linear(input, self.weight)


class ChannelRates(nn.Module):
    """What a channel of a scan has of its own: the logarithms of its N rates, at first of 1 to N, and its skip D, at first 1."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.empty(num_channels, STATE_SIZE))
        self.D = nn.Parameter(torch.empty(num_channels))

    def reset_parameters(self) -> None:
        """Set both: S4D-Real (arXiv 2206.11893), as in the paper."""
        with torch.no_grad():
            self.A_log.copy_(torch.arange(1, STATE_SIZE + 1, dtype=torch.float64).log().expand_as(self.A_log))
            self.D.fill_(1.0)

    def forward(self) -> tuple[Tensor, Tensor]:
        """A ``[E, N]``, float32 or wider, and D ``[E]``."""
        return -at_least_float32(self.A_log).exp(), self.D


class MambaMixer(LayerMixer):
    """o = out(scan(u, Δ, A, B, C) ⊙ silu(z)), u convolved; Δ, B and C made of u.

    Mamba's layer (arXiv 2312.00752, sections 3.4 and 3.6): one projection makes u and z, of twice as many channels as the config's
    heads have together; a convolution of 4 taps with bias and silu over u; from its output one projection makes B and C, of 16
    numbers each that all channels share, and C/16 numbers from which a second one makes the logits of each channel's step;
    a state of 16 numbers per channel, each with a rate of its own. About 6 C² numbers where the config's heads have C channels.
    The paper's model has no feed-forward layers; here the block keeps its own.

    It remembers ``{"state": [B, E, 16], "taps": [B, 3, E]}``.
    """

    name = "mamba"

    def __init__(self, config: LinearLlama3Config, layer: int) -> None:
        super().__init__(config, layer)
        self.inner = EXPAND * config.num_heads * config.size_of_head
        self.rank = -(-config.dim // CHANNELS_PER_RANK)
        self.in_proj = nn.Linear(config.dim, 2 * self.inner, bias=False)
        self.convolution = ShortConvolution(self.inner, bias=True)
        self.x_proj = nn.Linear(self.inner, self.rank + 2 * STATE_SIZE, bias=False)
        self.dt_proj = StepProjection(self.rank, self.inner)
        self.rates = ChannelRates(self.inner)
        self.out_proj = nn.Linear(self.inner, config.dim, bias=False)

    def mix(self, x: Tensor, context: Context) -> tuple[Tensor, LayerMemory | None]:
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u, taps = self.convolution(u, context)
        low, b, c = self.x_proj(u).split((self.rank, STATE_SIZE, STATE_SIZE), dim=-1)
        rates, skip = self.rates()
        found = selective_scan(
            u,
            self.dt_proj(low),
            rates,
            b,
            c,
            skip,
            z,
            self.dt_proj.bias,
            True,
            initial_state=context.remembered("state"),
            output_final_state=context.outputs_memory,
            layout=context.layout,
            exchange=self.parallel.exchange,
        )
        o, state = found if isinstance(found, tuple) else (found, None)
        out: Tensor = self.out_proj(o)
        if state is None or taps is None:
            return out, None
        return out, LayerMemory({"state": context.of_its_own(state), "taps": taps})

    def init_weights(self, initial: InitialWeights) -> None:
        initial.fill(self, residual=(self.out_proj,))

    def flops_per_token(self, seq_len: int) -> float:
        """As of the other mixers, a state's two products for each channel: what its tokens write, and what they read."""
        of_state = 12.0 * self.inner * STATE_SIZE
        return operations_of_matrices(self) + self.convolution.flops_per_token + of_state

    def footprint(self) -> Footprint:
        # u before and after its convolution, z, the steps, the output; and what makes steps, B and C.
        narrow = 5 * self.inner + self.x_proj.out_features
        return Footprint(narrow, 0, state=self.inner * STATE_SIZE, halo=self.convolution.halo)
