"""Multi-scale retention (`retention`).

Shapes: B batch rows, T tokens of this rank, C channels of the residual stream, H heads, D head dimension.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from longspan.dtypes import accumulation_dtype
from longspan.errors import ConfigError
from longspan.features import retnet_log_decays
from longspan.models.initial import InitialWeights
from longspan.models.mixers.layer import Footprint, LayerMixer, memory_of, operations_of_state, write_state
from longspan.models.mixers.mixer import Context, LayerMemory, operations_of_matrices
from longspan.models.norms import group_norm
from longspan.models.rotary import rotate, rotation_by

if TYPE_CHECKING:
    from longspan.models.config import LinearLlama3Config

_SLOWEST = 1e-4
"""Angles a token of the rotary embedding, the smallest; the largest is 1."""


class RetentionMixer(LayerMixer):
    """o = out(group_norm_per_head(read(rotated q, write(rotated k, v))) ⊙ silu(gate)), head h decaying by 1 − 2^(−5−h).

    RetNet's layer (arXiv 2307.08621, equation 8): values and gates of 2 D channels a head; rotated by angles from 1 to 1e-4 a token
    in equal ratios, without xPos's scales, as in its authors' code. There neighbouring channels turn together, and here those that
    stand D / 2 apart, which is another order of the same channels. 8 C² numbers where H · D = C, as in the paper.

    It remembers one matrix per head, ``{"state": [B, H, D, 2 D]}``.
    """

    name = "retention"

    def __init__(self, config: LinearLlama3Config, layer: int) -> None:
        super().__init__(config, layer)
        self.num_heads, self.eps = config.num_heads, config.norm_eps
        self.key_size, self.value_size = config.size_of_head, 2 * config.size_of_head
        # Numbers and not a buffer: the host needs them, and casting the model to bfloat16 would round 1 - 2^-12 to 1.
        self.log_decay = retnet_log_decays(self.num_heads)
        pairs = self.key_size // 2
        self.angles = tuple(_SLOWEST ** (pair / max(1, pairs - 1)) for pair in range(pairs))
        inner = self.num_heads * self.value_size
        self.q_proj, self.k_proj = (nn.Linear(config.dim, inner // 2, bias=False) for _ in range(2))
        self.v_proj, self.gate_proj = (nn.Linear(config.dim, inner, bias=False) for _ in range(2))
        self.out_proj = nn.Linear(inner, config.dim, bias=False)

    @classmethod
    def check(cls, config: LinearLlama3Config) -> None:
        if config.size_of_head % 2:
            raise ConfigError(
                f"the size of a head must be even, for the rotary embedding of retention; got {config.size_of_head}. Set head_dim"
            )

    def mix(self, x: Tensor, context: Context) -> tuple[Tensor, LayerMemory | None]:
        angles = rotation_by(context.positions, self.angles, accumulation_dtype(x.dtype))
        k, v = rotate(self._heads(self.k_proj(x)), angles), self._heads(self.v_proj(x))
        memory = write_state("retention", k, v, {"log_decay": self.log_decay}, context, self.parallel)
        q, gate = rotate(self._heads(self.q_proj(x)), angles), F.silu(self.gate_proj(x))
        out: Tensor = self.out_proj(group_norm(memory.read(q), self.eps).flatten(2) * gate)
        return out, memory_of(memory, context)

    def init_weights(self, initial: InitialWeights) -> None:
        initial.fill(self, residual=(self.out_proj,))

    def flops_per_token(self, seq_len: int) -> float:
        return operations_of_matrices(self) + operations_of_state(self.num_heads, self.key_size, self.value_size)

    def footprint(self) -> Footprint:
        keys, values = self.num_heads * self.key_size, self.num_heads * self.value_size
        # Angles of half as many pairs, cos and sin.
        wide = values + 2 * self.num_heads + self.key_size
        return Footprint(narrow=2 * keys + 5 * values, wide=wide, state=keys * self.value_size)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))
