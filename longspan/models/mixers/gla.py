"""Gated linear attention (`gla`).

Shapes: B batch rows, T tokens of this rank, C channels of the residual stream, H heads, D head dimension.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from longspan.errors import ConfigError
from longspan.models.gates import LOW_RANK, ChannelDecayGate
from longspan.models.initial import InitialWeights
from longspan.models.mixers.layer import Footprint, LayerMixer, memory_of, operations_of_state, write_state
from longspan.models.mixers.mixer import Context, LayerMemory, operations_of_matrices
from longspan.models.norms import GatedRMSNorm

if TYPE_CHECKING:
    from longspan.models.config import LinearLlama3Config


class GLAMixer(LayerMixer):
    """o = out(norm_per_head(read(q, write(k, v))) ⊙ silu(gate)), the state decaying by one number per token and key channel.

    GLA's layer (arXiv 2312.06635, section 4.4): keys of D / 2 channels a head and values of D, no feature map, decays through a
    projection of rank 16 and σ(·)^(1/16). 4 C² numbers and those of the decays where H · D = C, as in the paper.

    It remembers one matrix per head, ``{"state": [B, H, D / 2, D]}``.
    """

    name = "gla"

    def __init__(self, config: LinearLlama3Config, layer: int) -> None:
        super().__init__(config, layer)
        self.num_heads, self.key_size, self.value_size = config.num_heads, config.size_of_head // 2, config.size_of_head
        inner = self.num_heads * self.value_size
        self.q_proj, self.k_proj = (nn.Linear(config.dim, inner // 2, bias=False) for _ in range(2))
        self.v_proj, self.gate_proj = (nn.Linear(config.dim, inner, bias=False) for _ in range(2))
        self.decay = ChannelDecayGate(config.dim, self.num_heads, self.key_size)
        self.norm = GatedRMSNorm(self.value_size, config.norm_eps)
        self.out_proj = nn.Linear(inner, config.dim, bias=False)

    @classmethod
    def check(cls, config: LinearLlama3Config) -> None:
        if config.size_of_head % 2:
            raise ConfigError(
                f"the size of a head must be even, for the keys of gla, which have half of it; got {config.size_of_head}. Set "
                "head_dim"
            )

    def mix(self, x: Tensor, context: Context) -> tuple[Tensor, LayerMemory | None]:
        k, v, gates = self._heads(self.k_proj(x)), self._heads(self.v_proj(x)), self.decay(x)
        memory = write_state("gla", k, v, gates, context, self.parallel)
        q, gate = self._heads(self.q_proj(x)), self._heads(self.gate_proj(x))
        out: Tensor = self.out_proj(self.norm(memory.read(q), gate).flatten(2))
        return out, memory_of(memory, context)

    def init_weights(self, initial: InitialWeights) -> None:
        initial.fill(self, residual=(self.out_proj,))

    def flops_per_token(self, seq_len: int) -> float:
        return operations_of_matrices(self) + operations_of_state(self.num_heads, self.key_size, self.value_size)

    def footprint(self) -> Footprint:
        keys, values = self.num_heads * self.key_size, self.num_heads * self.value_size
        wide = 3 * keys + 2 * values + self.num_heads
        return Footprint(narrow=2 * keys + 5 * values + LOW_RANK, wide=wide, state=keys * self.value_size)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))
