"""Kimi Delta Attention (`kda`).

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


class KDAMixer(DeltaLayer):
    """o = out(norm_per_head(read(q, write(k, v))) ⊙ σ(gate)): DeltaNet's layer whose state decays by key channels.

    Kimi Linear's layer (arXiv 2510.26692): q, k and v through a convolution of 4 taps and silu, q and k then of length 1;
    decays −e^A_log · softplus(x W₁ W₂ + dt_bias), one per token and key channel, and the output's gate x W₁ W₂, both through a rank
    of D, the size of a head; strengths σ(x W). 4 C² + 4 D C numbers and those of β and the convolution where H · D = C.

    It remembers ``{"state": [B, H, D, D], "taps": [B, 3, 3 H · D]}``.
    """

    name, operator = "kda", "kda"

    def __init__(self, config: LinearLlama3Config, layer: int) -> None:
        super().__init__(config, layer)
        self.add_convolution(config)
        rank = self.key_size
        self.dt_proj, self.gate_proj = (
            nn.Sequential(nn.Linear(config.dim, rank, bias=False), nn.Linear(rank, self.num_keys, bias=False))
            for _ in range(2)
        )
        self.decay = StepDecay(self.num_heads, self.key_size)
        self.add_output(config, GatedRMSNorm(self.value_size, config.norm_eps, "sigmoid"))

    def gates(self, x: Tensor) -> dict[str, Tensor]:
        _, g = self.decay(self.dt_proj(x))
        return {"g": g, **self.strength(x)}

    def output_gate(self, x: Tensor) -> Tensor:
        return self._heads(self.gate_proj(x))

    def footprint(self) -> Footprint:
        narrow = 7 * self.num_keys + 2 * self.key_size
        return self.footprint_of(narrow, wide=12 * self.num_keys + 4 * self.num_heads)
