"""Based's linear attention (`based`).

Shapes: B batch rows, C channels of the residual stream, H heads, D head dimension.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from longspan.features import taylor
from longspan.models.mixers.layer import Footprint
from longspan.models.mixers.normalized_layer import KEY_SIZE, NormalizedLayer

if TYPE_CHECKING:
    from longspan.models.config import LinearLlama3Config


class BasedMixer(NormalizedLayer):
    """o = out(Σ (φ(q)·φ(k)) v / (Σ φ(q)·φ(k))), φ(q)·φ(k) = 1 + s + s²/2 for s = q·k / √16, nothing forgotten.

    The linear attention of Based (arXiv 2402.18668): queries and keys of 16 channels a head, no norm, no gate. The
    paper's models have it beside attention over short windows: N layers with `window`. φ has 153 features, in which the paper's 273
    are without those that are there twice.

    It remembers one matrix per head, its last column the sum of keys, ``{"state": [B, H, 153, D + 1]}``.
    """

    name = "based"
    num_features = 1 + KEY_SIZE + KEY_SIZE * (KEY_SIZE + 1) // 2
    eps = 1e-12

    def __init__(self, config: LinearLlama3Config, layer: int) -> None:
        super().__init__(config, layer)
        self.add_output(config)

    def features_of(self, x: Tensor) -> Tensor:
        return taylor(x)

    def footprint(self) -> Footprint:
        return self.footprint_of(wide_of_head=4 * KEY_SIZE + 1)
