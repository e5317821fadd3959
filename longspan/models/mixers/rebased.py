"""ReBased's linear attention (`rebased`).

Shapes: B batch rows, C channels of the residual stream, H heads, D head dimension.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from longspan.features import Rebased
from longspan.models.mixers.layer import Footprint
from longspan.models.mixers.normalized_layer import KEY_SIZE, NormalizedLayer

if TYPE_CHECKING:
    from longspan.models.config import LinearLlama3Config


class RebasedMixer(NormalizedLayer):
    """o = out(Σ (φ(q)·φ(k)) v / (Σ φ(q)·φ(k) + 1e-5)), φ(q)·φ(k) = (q'·k')² / 16 with x' = γ ⊙ layer_norm(x) + β learned.

    ReBased (arXiv 2402.10644): Based's layer with a learned quadratic kernel, which can reach zero; γ and β are the
    same for queries, keys and heads, as in its authors' code. Nothing is forgotten.

    It remembers one matrix per head, its last column the sum of keys, ``{"state": [B, H, 136, D + 1]}``.
    """

    name = "rebased"
    num_features = KEY_SIZE * (KEY_SIZE + 1) // 2
    eps = 1e-5

    def __init__(self, config: LinearLlama3Config, layer: int) -> None:
        super().__init__(config, layer)
        self.features = Rebased(KEY_SIZE)
        self.add_output(config)

    def features_of(self, x: Tensor) -> Tensor:
        features: Tensor = self.features(x)
        return features

    def footprint(self) -> Footprint:
        return self.footprint_of(wide_of_head=8 * KEY_SIZE + 5)
