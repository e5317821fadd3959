"""Basic linear attention (`linear_attention`).

Shapes: B batch rows, T tokens of this rank, C channels of the residual stream, H heads, D head dimension.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from longspan.features import elu_plus_one
from longspan.models.initial import InitialWeights
from longspan.models.mixers.layer import Footprint, LayerMixer, memory_of, operations_of_state, write_state
from longspan.models.mixers.mixer import Context, LayerMemory, operations_of_matrices
from longspan.models.norms import RMSNorm

if TYPE_CHECKING:
    from longspan.models.config import LinearLlama3Config


class LinearAttentionMixer(LayerMixer):
    """o = out(norm_per_head(read(φ(q), write(φ(k), v)))), φ = elu + 1, nothing forgotten (arXiv 2006.16236).

    In place of the denominator φ(q)·Σφ(k) a norm over the channels of a head (arXiv 2210.10340), as in LASP and LASP-2 (arXiv
    2404.02882, 2502.07563), whose exchange is of states alone. No gate: 4 C² numbers where H · D = C.

    It remembers one matrix per head, ``{"state": [B, H, D, D]}``.
    """

    name = "linear_attention"

    def __init__(self, config: LinearLlama3Config, layer: int) -> None:
        super().__init__(config, layer)
        self.num_heads, self.head_dim = config.num_heads, config.size_of_head
        inner = self.num_heads * self.head_dim
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(config.dim, inner, bias=False) for _ in range(3))
        self.norm = RMSNorm(self.head_dim, config.norm_eps)
        self.out_proj = nn.Linear(inner, config.dim, bias=False)

    def mix(self, x: Tensor, context: Context) -> tuple[Tensor, LayerMemory | None]:
        k, v = elu_plus_one(self._heads(self.k_proj(x))), self._heads(self.v_proj(x))
        memory = write_state("linear_attention", k, v, {}, context, self.parallel)
        q = elu_plus_one(self._heads(self.q_proj(x)))
        out: Tensor = self.out_proj(self.norm(memory.read(q)).flatten(2))
        return out, memory_of(memory, context)

    def init_weights(self, initial: InitialWeights) -> None:
        initial.fill(self, residual=(self.out_proj,))

    def flops_per_token(self, seq_len: int) -> float:
        return operations_of_matrices(self) + operations_of_state(self.num_heads, self.head_dim, self.head_dim)

    def footprint(self) -> Footprint:
        inner = self.num_heads * self.head_dim
        return Footprint(narrow=4 * inner, wide=6 * inner + self.num_heads, state=inner * self.head_dim)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim))
