"""Linear attention (L): writes first and reads last, so that everything between hides the exchange between ranks.

Shapes: B batch rows, T tokens of this rank, C channels of the residual stream, H heads, D head dimension.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from longspan.attention import linear
from longspan.features import elu_plus_one, unit_length
from longspan.models.config import LinearLlama3Config
from longspan.models.gates import GATE_BUILDERS
from longspan.models.initial import InitialWeights
from longspan.models.mixers.mixer import Context, LayerMemory, SequenceMixer, operations_of_matrices
from longspan.models.norms import GatedRMSNorm
from longspan.ops.variants import VARIANTS
from longspan.state import Dense


class LinearMixer(SequenceMixer):
    """Linear attention: o = out(norm_per_head(read(φ(q), write(φ(k), v))) ⊙ silu(gate)).

    φ is elu + 1 (arXiv 2006.16236) where states only decay: in short runs on source code it gave a lower loss than silu and
    than none, with each of those operators. The delta rules need keys of unit length: there φ is silu, then a length of 1
    (arXiv 2406.06484). The norm after reading makes the output's size independent of how much a state has gathered.

    It remembers one matrix per head, ``{"state": [B, H, D, D]}``.
    """

    def __init__(self, config: LinearLlama3Config, operator: str) -> None:
        super().__init__()
        self.operator = operator
        self.num_heads, self.head_dim = config.num_heads, config.size_of_head
        inner = self.num_heads * self.head_dim
        self.q_proj, self.k_proj, self.v_proj, self.gate_proj = (
            nn.Linear(config.dim, inner, bias=False) for _ in range(4)
        )
        self.decay = GATE_BUILDERS[operator](config.dim, self.num_heads, self.head_dim)
        self.has_unit_keys = VARIANTS[operator].transition is Dense
        self.norm = GatedRMSNorm(self.head_dim, config.norm_eps)
        self.out_proj = nn.Linear(inner, config.dim, bias=False)

    def mix(self, x: Tensor, context: Context) -> tuple[Tensor, LayerMemory | None]:
        k, v, gates = self._features(self.k_proj(x)), self._heads(self.v_proj(x)), self.decay(x)
        memory = linear.write_linear(
            self.operator,
            k,
            v,
            gates,
            initial_state=context.remembered("state"),
            output_final_state=context.outputs_memory,
            layout=context.layout,
            exchange=self.parallel.exchange,
            has_safe_gates=True,
        )
        q, gate = self._features(self.q_proj(x)), self.gate_proj(x)
        out: Tensor = self.out_proj(self.norm(memory.read(q), self._heads(gate)).flatten(2))
        return out, LayerMemory({"state": memory.final_state()}) if context.outputs_memory else None

    def init_weights(self, initial: InitialWeights) -> None:
        initial.fill(self, residual=(self.out_proj,))

    def flops_per_token(self, seq_len: int) -> float:
        # In the recurrent form; what a chunk form computes inside its chunks comes on top.
        return operations_of_matrices(self) + 12.0 * self.num_heads * self.head_dim * self.head_dim

    def _features(self, x: Tensor) -> Tensor:
        return unit_length(F.silu(self._heads(x))) if self.has_unit_keys else elu_plus_one(self._heads(x))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim))
