"""Based's linear attention (`based`).

Shapes: B batch rows, T tokens of this rank, C channels of the residual stream, H heads, D head dimension.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from longspan.attention.normalized import write_normalized
from longspan.features import taylor
from longspan.models.initial import InitialWeights
from longspan.models.mixers.layer import Footprint, LayerMixer, memory_of, operations_of_state
from longspan.models.mixers.mixer import Context, LayerMemory, operations_of_matrices

if TYPE_CHECKING:
    from longspan.models.config import LinearLlama3Config

KEY_SIZE = 16
"""Channels of a query and a key before the feature map; 16 in the paper."""
_NUM_FEATURES = 1 + KEY_SIZE + KEY_SIZE * (KEY_SIZE + 1) // 2
_EPS = 1e-12


class BasedMixer(LayerMixer):
    """o = out(Σ (φ(q)·φ(k)) v / (Σ φ(q)·φ(k))), φ(q)·φ(k) = 1 + s + s²/2 for s = q·k / √16, nothing forgotten.

    The linear attention of Based (arXiv 2402.18668): queries and keys of 16 channels a head, no norm, no gate. The
    paper's models have it beside attention over short windows: N layers with `window`. φ has 153 features, in which the paper's 273
    are without those that are there twice.

    It remembers one matrix per head, its last column the sum of keys, ``{"state": [B, H, 153, D + 1]}``.
    """

    name = "based"

    def __init__(self, config: LinearLlama3Config, layer: int) -> None:
        super().__init__(config, layer)
        self.num_heads, self.head_dim = config.num_heads, config.size_of_head
        inner = self.num_heads * self.head_dim
        self.q_proj, self.k_proj = (nn.Linear(config.dim, self.num_heads * KEY_SIZE, bias=False) for _ in range(2))
        self.v_proj = nn.Linear(config.dim, inner, bias=False)
        self.out_proj = nn.Linear(inner, config.dim, bias=False)

    def mix(self, x: Tensor, context: Context) -> tuple[Tensor, LayerMemory | None]:
        memory = write_normalized(
            taylor(self._heads(self.k_proj(x))),
            self._heads(self.v_proj(x)),
            eps=_EPS,
            initial_state=context.remembered("state"),
            output_final_state=context.outputs_memory,
            layout=context.layout,
            exchange=self.parallel.exchange,
        )
        out: Tensor = self.out_proj(memory.read(taylor(self._heads(self.q_proj(x)))).flatten(2))
        return out, memory_of(memory, context)

    def init_weights(self, initial: InitialWeights) -> None:
        initial.fill(self, residual=(self.out_proj,))

    def flops_per_token(self, seq_len: int) -> float:
        return operations_of_matrices(self) + operations_of_state(self.num_heads, _NUM_FEATURES, self.head_dim + 1)

    def footprint(self) -> Footprint:
        features, values = self.num_heads * _NUM_FEATURES, self.num_heads * (self.head_dim + 1)
        narrow = 2 * features + 2 * values + self.num_heads * self.head_dim
        wide = (4 * KEY_SIZE + 1) * self.num_heads
        return Footprint(narrow, wide, state=features * (self.head_dim + 1))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))
