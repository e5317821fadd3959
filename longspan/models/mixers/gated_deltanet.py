"""Gated DeltaNet's layer (`gated_deltanet`).

Shapes: B batch rows, T tokens of this rank, C channels of the residual stream, H heads, D head dimension.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from longspan.models.gates import StepDecay
from longspan.models.mixers.delta_layer import DeltaLayer
from longspan.models.mixers.layer import Footprint
from longspan.models.norms import GatedRMSNorm

if TYPE_CHECKING:
    from longspan.models.config import LinearLlama3Config


class GatedDeltaNetMixer(DeltaLayer):
    """o = out(norm_per_head(read(q, write(k, v))) ⊙ silu(gate)): DeltaNet's layer whose state decays by Mamba-2's numbers.

    Gated DeltaNet (arXiv 2412.06464): q, k and v through a convolution of 4 taps and silu, q and k then of length 1;
    values and gates of 2 D channels a head; decays −e^A_log · softplus(x W + dt_bias) and strengths σ(x W), one per token and head.
    8 H · D · C numbers and those of the small projections: the paper has heads of ¾ C channels together, and so 6 C².

    It remembers ``{"state": [B, H, D, 2 D], "taps": [B, 3, 4 H · D]}``.
    """

    name, operator = "gated_deltanet", "gated_delta_rule"
    value_share = 2

    def __init__(self, config: LinearLlama3Config, layer: int) -> None:
        super().__init__(config, layer)
        self.gate_proj = nn.Linear(config.dim, self.num_values, bias=False)
        self.add_convolution(config)
        self.dt_proj = nn.Linear(config.dim, self.num_heads, bias=False)
        self.decay = StepDecay(self.num_heads, least_rate=0.0)
        self.add_output(config, GatedRMSNorm(self.value_size, config.norm_eps))

    def gates(self, x: Tensor) -> dict[str, Tensor]:
        _, g = self.decay(self.dt_proj(x))
        return {"g": g, **self.strength(x)}

    def output_gate(self, x: Tensor) -> Tensor:
        return self._heads(self.gate_proj(x))

    def footprint(self) -> Footprint:
        narrow = 4 * self.num_keys + 5 * self.num_values
        return self.footprint_of(narrow, wide=5 * self.num_keys + 3 * self.num_values + 7 * self.num_heads)
