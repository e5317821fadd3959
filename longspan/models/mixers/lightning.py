"""Lightning Attention (`lightning`).

Shapes: B batch rows, T tokens of this rank, C channels of the residual stream, H heads, D head dimension.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from longspan.features import lightning_log_decays
from longspan.models.initial import InitialWeights
from longspan.models.mixers.layer import Footprint, LayerMixer, memory_of, operations_of_state, write_state
from longspan.models.mixers.mixer import Context, LayerMemory, operations_of_matrices
from longspan.models.norms import GatedRMSNorm

if TYPE_CHECKING:
    from longspan.models.config import LinearLlama3Config


class LightningMixer(LayerMixer):
    """o = out(norm(read(silu(q), write(silu(k), silu(v)))) ⊙ σ(gate)), a constant decay per head and layer, scale 1.

    As MiniMax-01 has it (arXiv 2501.08313; the operator: arXiv 2401.04658), after TransNormerLLM (arXiv 2307.14995), whose decays
    these are: ALiBi's slopes, which fall with the layer's number among all layers, so that the last one forgets next to nothing.
    One norm over all channels of all heads. 5 C² numbers where H · D = C.

    It remembers one matrix per head, ``{"state": [B, H, D, D]}``.
    """

    name = "lightning"

    def __init__(self, config: LinearLlama3Config, layer: int) -> None:
        super().__init__(config, layer)
        self.num_heads, self.head_dim = config.num_heads, config.size_of_head
        inner = self.num_heads * self.head_dim
        # Numbers and not a buffer: the host needs them, and bfloat16 would round small decays.
        self.log_decay = lightning_log_decays(self.num_heads, layer, config.num_layers)
        self.q_proj, self.k_proj, self.v_proj, self.gate_proj = (
            nn.Linear(config.dim, inner, bias=False) for _ in range(4)
        )
        self.norm = GatedRMSNorm(inner, config.norm_eps, "sigmoid")
        self.out_proj = nn.Linear(inner, config.dim, bias=False)

    def mix(self, x: Tensor, context: Context) -> tuple[Tensor, LayerMemory | None]:
        k, v = self._heads(F.silu(self.k_proj(x))), self._heads(F.silu(self.v_proj(x)))
        memory = write_state("retention", k, v, {"log_decay": self.log_decay}, context, self.parallel)
        q, gate = self._heads(F.silu(self.q_proj(x))), self.gate_proj(x)
        out: Tensor = self.out_proj(self.norm(memory.read(q, scale=1.0).flatten(2), gate))
        return out, memory_of(memory, context)

    def init_weights(self, initial: InitialWeights) -> None:
        initial.fill(self, residual=(self.out_proj,))

    def flops_per_token(self, seq_len: int) -> float:
        return operations_of_matrices(self) + operations_of_state(self.num_heads, self.head_dim, self.head_dim)

    def footprint(self) -> Footprint:
        inner = self.num_heads * self.head_dim
        return Footprint(narrow=9 * inner, wide=2 * inner + 1, state=inner * self.head_dim)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim))
