"""Simple gated linear attention, the layer that this library's main job trains (`simple_gla`).

Shapes: B batch rows, T tokens of this rank, C channels of the residual stream, H heads, D head dimension.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from longspan.features import elu_plus_one
from longspan.models.gates import ScalarDecayGate
from longspan.models.initial import InitialWeights
from longspan.models.mixers.layer import Footprint, LayerMixer, memory_of, operations_of_state, write_state
from longspan.models.mixers.mixer import Context, LayerMemory, operations_of_matrices
from longspan.models.norms import GatedRMSNorm

if TYPE_CHECKING:
    from longspan.models.config import LinearLlama3Config


class SimpleGLAMixer(LayerMixer):
    """o = out(norm_per_head(read(φ(q), write(φ(k), v))) ⊙ silu(gate)), the state decaying by one number per token and head.

    No one paper's layer: the form of gated retention (YOCO, arXiv 2405.05254), the decays of Mamba-2 (arXiv 2405.21060), and φ =
    elu + 1 (arXiv 2006.16236), which in short runs on source code gave a lower loss than silu and than none. The norm after reading
    makes the output's size independent of how much a state has gathered.

    It remembers one matrix per head, ``{"state": [B, H, D, D]}``.
    """

    name = "simple_gla"

    def __init__(self, config: LinearLlama3Config, layer: int) -> None:
        super().__init__(config, layer)
        self.num_heads, self.head_dim = config.num_heads, config.size_of_head
        inner = self.num_heads * self.head_dim
        self.q_proj, self.k_proj, self.v_proj, self.gate_proj = (
            nn.Linear(config.dim, inner, bias=False) for _ in range(4)
        )
        self.decay = ScalarDecayGate(config.dim, self.num_heads)
        self.norm = GatedRMSNorm(self.head_dim, config.norm_eps)
        self.out_proj = nn.Linear(inner, config.dim, bias=False)

    def mix(self, x: Tensor, context: Context) -> tuple[Tensor, LayerMemory | None]:
        k, v, gates = elu_plus_one(self._heads(self.k_proj(x))), self._heads(self.v_proj(x)), self.decay(x)
        memory = write_state("simple_gla", k, v, gates, context, self.parallel)
        q, gate = elu_plus_one(self._heads(self.q_proj(x))), self.gate_proj(x)
        out: Tensor = self.out_proj(self.norm(memory.read(q), self._heads(gate)).flatten(2))
        return out, memory_of(memory, context)

    def init_weights(self, initial: InitialWeights) -> None:
        initial.fill(self, residual=(self.out_proj,))

    def flops_per_token(self, seq_len: int) -> float:
        return operations_of_matrices(self) + operations_of_state(self.num_heads, self.head_dim, self.head_dim)

    def footprint(self) -> Footprint:
        inner = self.num_heads * self.head_dim
        return Footprint(narrow=7 * inner, wide=6 * inner + 4 * self.num_heads, state=inner * self.head_dim)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim))
