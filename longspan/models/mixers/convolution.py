"""The short convolution in front of a memory state, along a sequence that is split over ranks.

Shapes: B batch rows, T tokens of this rank, C channels, W taps.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from longspan.attention.convolution import causal_conv1d
from longspan.models.initial import DrawnModule
from longspan.models.mixers.mixer import Context

NUM_TAPS = 4
"""W, in every layer that has one (H3, arXiv 2212.14052; Mamba, arXiv 2312.00752)."""


class ShortConvolution(DrawnModule):
    """silu of a depthwise causal convolution of W = 4 taps over ``[B, T, C]``; it remembers its last inputs, ``[B, W-1, C]``.

    One call for the channels of queries, keys and values together: the ranks exchange one halo.
    """

    def __init__(self, num_channels: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_channels, NUM_TAPS))
        self.bias = nn.Parameter(torch.empty(num_channels)) if bias else None

    def draw_parameters(self, generator: torch.Generator) -> None:
        """Uniform within ±1/√W, as `torch.nn.Conv1d` has them, which the papers' authors left as it is."""
        bound = NUM_TAPS**-0.5
        for parameter in self.parameters():
            drawn = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
            parameter.copy_(drawn)

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
        """The convolved x, and the last inputs if the context asks what is remembered."""
        found = causal_conv1d(
            x,
            self.weight,
            self.bias,
            "silu",
            context.layout,
            initial_state=context.remembered("taps"),
            output_final_state=context.outputs_memory,
        )
        return (found[0], context.of_its_own(found[1])) if isinstance(found, tuple) else (found, None)

    @property
    def halo(self) -> int:
        """Numbers that a segment is sent."""
        return (NUM_TAPS - 1) * len(self.weight)

    @property
    def flops_per_token(self) -> float:
        """Operations of forward and backward for one token."""
        return 6.0 * self.weight.numel()
