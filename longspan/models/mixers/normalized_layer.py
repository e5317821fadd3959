"""What the layers have in common whose output is divided by the sum of its weights, as softmax attention's is.

Shapes: B batch rows, T tokens of this rank, C channels of the residual stream, H heads, D head dimension, F features of a key.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from longspan.attention.normalized import write_normalized
from longspan.models.initial import InitialWeights
from longspan.models.mixers.layer import Footprint, LayerMixer, memory_of, operations_of_state
from longspan.models.mixers.mixer import Context, LayerMemory, operations_of_matrices

if TYPE_CHECKING:
    from longspan.models.config import LinearLlama3Config

KEY_SIZE = 16
"""Channels of a query and a key before the feature map; 16 in the papers' language models."""


class NormalizedLayer(LayerMixer):
    """o = out(Σ (φ(q)·φ(k)) v / (Σ φ(q)·φ(k) + eps)): queries and keys of 16 channels a head, no norm, no gate, nothing forgotten.

    A kind of it says what φ is (`features_of`), of how many features, and what is added. It registers what φ has of its own
    before `add_output`.

    It remembers one matrix per head, its last column the sum of keys, ``{"state": [B, H, F, D + 1]}``.
    """

    num_features: ClassVar[int]
    """F."""
    eps: ClassVar[float]
    """Added to the sum of weights."""

    out_proj: nn.Linear

    def __init__(self, config: LinearLlama3Config, layer: int) -> None:
        super().__init__(config, layer)
        self.num_heads, self.head_dim = config.num_heads, config.size_of_head
        self.q_proj, self.k_proj = (nn.Linear(config.dim, self.num_heads * KEY_SIZE, bias=False) for _ in range(2))
        self.v_proj = nn.Linear(config.dim, self.num_heads * self.head_dim, bias=False)

    def add_output(self, config: LinearLlama3Config) -> None:
        """What writes into the residual stream."""
        self.out_proj = nn.Linear(self.num_heads * self.head_dim, config.dim, bias=False)

    @abstractmethod
    def features_of(self, x: Tensor) -> Tensor:
        """φ of queries or keys ``[B, T, H, 16]``, ``[B, T, H, F]``."""

    def mix(self, x: Tensor, context: Context) -> tuple[Tensor, LayerMemory | None]:
        memory = write_normalized(
            self.features_of(self._heads(self.k_proj(x))),
            self._heads(self.v_proj(x)),
            eps=self.eps,
            initial_state=context.remembered("state"),
            output_final_state=context.outputs_memory,
            layout=context.layout,
            exchange=self.parallel.exchange,
        )
        out: Tensor = self.out_proj(memory.read(self.features_of(self._heads(self.q_proj(x)))).flatten(2))
        return out, memory_of(memory, context)

    def init_weights(self, initial: InitialWeights) -> None:
        initial.fill(self, residual=(self.out_proj,))

    def flops_per_token(self, seq_len: int) -> float:
        return operations_of_matrices(self) + operations_of_state(self.num_heads, self.num_features, self.head_dim + 1)

    def footprint_of(self, wide_of_head: int) -> Footprint:
        """The layer's, of what φ saves of a token in float32, a head."""
        features, values = self.num_heads * self.num_features, self.num_heads * (self.head_dim + 1)
        narrow = 2 * features + 2 * values + self.num_heads * self.head_dim
        return Footprint(narrow, wide_of_head * self.num_heads, state=features * (self.head_dim + 1))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))
