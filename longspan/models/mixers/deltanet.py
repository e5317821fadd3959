"""DeltaNet's layer (`deltanet`).

Shapes: B batch rows, T tokens of this rank, C channels of the residual stream, H heads, D head dimension.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from longspan.models.mixers.delta_layer import DeltaLayer
from longspan.models.mixers.layer import Footprint
from longspan.models.norms import RMSNorm

if TYPE_CHECKING:
    from longspan.models.config import LinearLlama3Config


class DeltaNetMixer(DeltaLayer):
    """o = out(norm_per_head(read(q, write(k, v)))): a token replaces what its key reads by its value, to the share β = σ(x W).

    DeltaNet's layer (arXiv 2406.06484): q, k and v through a convolution of 4 taps and silu, q and k then of length 1.
    4 C² numbers and those of β and the convolution where H · D = C, as in the paper.

    It remembers ``{"state": [B, H, D, D], "taps": [B, 3, 3 H · D]}``.
    """

    name, operator = "deltanet", "delta_rule"

    def __init__(self, config: LinearLlama3Config, layer: int) -> None:
        super().__init__(config, layer)
        self.add_convolution(config)
        self.add_output(config, RMSNorm(self.value_size, config.norm_eps))

    def gates(self, x: Tensor) -> dict[str, Tensor]:
        return self.strength(x)

    def footprint(self) -> Footprint:
        return self.footprint_of(narrow=5 * self.num_keys, wide=8 * self.num_keys + 4 * self.num_heads)
