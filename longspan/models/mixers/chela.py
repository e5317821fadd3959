"""CHELA's layer: a short and a long convolution in front of gated linear attention (`chela`).

Shapes: B batch rows, T tokens of this rank, C channels of the residual stream, H heads, D head dimension; W taps, N exponentials.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspan.attention.convolution import causal_conv1d
from longspan.attention.long_convolution.kernels import ExponentialKernel
from longspan.attention.long_convolution.operator import long_conv1d
from longspan.dtypes import at_least_float32
from longspan.exchange import Exchanger
from longspan.models.initial import DrawnModule, InitialWeights
from longspan.models.mixers.convolution import NUM_TAPS
from longspan.models.mixers.layer import Footprint, LayerMixer, operations_of_state, write_state
from longspan.models.mixers.mixer import Context, LayerMemory, operations_of_matrices
from longspan.models.norms import GatedRMSNorm
from longspan.ops.long_convolution.exponentials import MOST_TOKENS

if TYPE_CHECKING:
    from longspan.models.config import LinearLlama3Config

NUM_EXPONENTIALS = 16
"""N of each channel."""
SLOWEST = 4096.0
"""Tokens after which the slowest of them has decayed to 1/e at first; the fastest has after one."""


class ShortLongConvolution(DrawnModule):
    """A depthwise causal convolution of W = 4 taps, silu, and then one with a sum of N = 16 exponentials, over ``[B, T, C]``.

    It remembers the last inputs ``[B, W-1, C]`` and the state of the exponentials ``[B, C, N]``, float32 or wider, whatever the
    number of tokens.
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_channels, NUM_TAPS))
        self.log_rates = nn.Parameter(torch.empty(num_channels, NUM_EXPONENTIALS))
        self.coefficients = nn.Parameter(torch.empty(num_channels, NUM_EXPONENTIALS))

    def draw_parameters(self, generator: torch.Generator) -> None:
        """Taps uniform within ±1/√W; rates in equal ratios from 1 to 1/4096 a token; coefficients normal.

        An exponential of rate r answers to independent inputs of variance 1 with a variance of 1 / (1 − e^{−2r}): its coefficient
        has the deviation that makes each of them 1/N.
        """
        bound = NUM_TAPS**-0.5
        self.weight.copy_(torch.empty(self.weight.shape).uniform_(-bound, bound, generator=generator))
        log_rates = -torch.linspace(0, math.log(SLOWEST), NUM_EXPONENTIALS, dtype=torch.float64)
        deviations = (-torch.expm1(-2 * log_rates.exp()) / NUM_EXPONENTIALS).sqrt()
        self.log_rates.copy_(log_rates.expand(self.log_rates.shape))
        drawn = torch.empty(self.coefficients.shape).normal_(generator=generator)
        self.coefficients.copy_(drawn * deviations)

    def forward(self, x: Tensor, context: Context, exchange: str | Exchanger) -> tuple[Tensor, dict[str, Tensor]]:
        """The convolved x, and what is remembered if the context asks for it."""
        kernel = ExponentialKernel(-at_least_float32(self.log_rates).exp(), at_least_float32(self.coefficients))
        asked = context.outputs_memory
        short = causal_conv1d(
            x,
            self.weight,
            activation="silu",
            layout=context.layout,
            initial_state=context.remembered("taps"),
            output_final_state=asked,
        )
        long = long_conv1d(
            short if isinstance(short, Tensor) else short[0],
            kernel,
            layout=context.layout,
            initial_state=context.remembered("exponentials"),
            output_final_state=asked,
            exchange=exchange,
        )
        if isinstance(short, Tensor) or isinstance(long, Tensor):
            assert isinstance(long, Tensor)
            return long, {}
        return long[0], {"taps": short[1], "exponentials": long[1]}

    @property
    def flops_per_token(self) -> float:
        """Operations of forward and backward for one token, in the recurrent form."""
        return 6.0 * self.weight.numel() + 12.0 * self.coefficients.numel()


class CHELAMixer(LayerMixer):
    """o = out(norm_per_head(read(silu(q z), write(silu(k z), v x))) ⊙ silu(gate z)), z the short-long convolution of x.

    CHELA's layer (arXiv 2406.08128): a short convolution for what changes fast, silu, and on that a long one for what lasts, in the
    place of a state-space model; linear attention, without decay, whose queries and keys are of what was convolved and whose values
    are of the layer's input; and a gate of what was convolved on its output. 5 C² numbers where H · D = C, and 36 C of the
    convolutions.

    The order of the parts is that of published summaries, which leave open, as its abstract does: activations and norms of the
    attention, sizes of kernels and heads, how the long kernel is made, and the merging of branches for inference. What is chosen is
    in docs/models.md: the long kernel is a sum of exponentials, for which decoding has a state of constant size.

    It remembers ``{"state": [B, H, D, D], "taps": [B, 3, C], "exponentials": [B, C, 16]}``.
    """

    name = "chela"

    def __init__(self, config: LinearLlama3Config, layer: int) -> None:
        super().__init__(config, layer)
        self.num_heads, self.head_dim, self.dim = config.num_heads, config.size_of_head, config.dim
        inner = self.num_heads * self.head_dim
        self.convolution = ShortLongConvolution(config.dim)
        self.q_proj, self.k_proj, self.v_proj, self.gate_proj = (
            nn.Linear(config.dim, inner, bias=False) for _ in range(4)
        )
        self.norm = GatedRMSNorm(self.head_dim, config.norm_eps)
        self.out_proj = nn.Linear(inner, config.dim, bias=False)

    def mix(self, x: Tensor, context: Context) -> tuple[Tensor, LayerMemory | None]:
        convolved, remembered = self.convolution(x, context, self.parallel.exchange)
        k, v = self._heads(F.silu(self.k_proj(convolved))), self._heads(self.v_proj(x))
        memory = write_state("linear_attention", k, v, {}, context, self.parallel)
        q, gate = self._heads(F.silu(self.q_proj(convolved))), self._heads(self.gate_proj(convolved))
        out: Tensor = self.out_proj(self.norm(memory.read(q), gate).flatten(2))
        if not context.outputs_memory:
            return out, None
        found = {"state": memory.final_state(), **remembered}
        return out, LayerMemory({name: context.of_its_own(x) for name, x in found.items()})

    def init_weights(self, initial: InitialWeights) -> None:
        initial.fill(self, residual=(self.out_proj,))

    def flops_per_token(self, seq_len: int) -> float:
        state = operations_of_state(self.num_heads, self.head_dim, self.head_dim)
        return operations_of_matrices(self) + self.convolution.flops_per_token + state

    def footprint(self) -> Footprint:
        inner = self.num_heads * self.head_dim
        exponentials = self.dim * NUM_EXPONENTIALS
        # Of the exponentials the tokens chunk by chunk, and a state at every chunk; with a halo travels their state.
        wide = 2 * inner + self.num_heads + self.dim + exponentials // MOST_TOKENS
        narrow = self.dim + 9 * inner
        halo = (NUM_TAPS - 1) * self.dim + exponentials
        return Footprint(narrow, wide, state=inner * self.head_dim, halo=halo)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))
