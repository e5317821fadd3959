"""HGRN2's gated linear recurrence (`hgrn2`).

Shapes: B batch rows, T tokens of this rank, C channels of the residual stream, H heads, D head dimension.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspan.dtypes import at_least_float32
from longspan.features import hgrn2_log_decay, hgrn2_lower_bounds
from longspan.models.initial import InitialWeights
from longspan.models.mixers.layer import Footprint, LayerMixer, memory_of, operations_of_state, write_state
from longspan.models.mixers.mixer import Context, LayerMemory, operations_of_matrices
from longspan.models.norms import RMSNorm

if TYPE_CHECKING:
    from longspan.models.config import LinearLlama3Config


class BoundLogits(nn.Module):
    """What the lower bounds of the forget gates of all layers are made of by `hgrn2_lower_bounds` (HGRN, arXiv 2311.04823).

    One logit per layer and channel, all zero at first: the bounds then rise in equal steps from 0. Returns ``[num_layers, H · D]``.
    Each layer makes its bounds itself, so that recomputing it needs nothing of what was made outside.
    """

    def __init__(self, num_layers: int, num_channels: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.empty(num_layers, num_channels))

    def reset_parameters(self) -> None:
        """Set the logits to zero."""
        nn.init.zeros_(self.logits)

    def forward(self) -> Tensor:
        return self.logits


class HGRN2Mixer(LayerMixer):
    """o = out(norm(read(silu(q), write(1 − f, i)))), states decaying by f = bound + (1 − bound) · σ(forget), scale 1.

    HGRN2's layer (arXiv 2404.07904): the key is what the forget gate leaves, so that there is no projection of keys, and one norm
    goes over all channels. The bounds of all HGRN2 layers are one parameter of the model (`BoundLogits`): the first such layer has
    a bound of 0, and a single one has no parameter. 4 C² numbers where H · D = C.

    It remembers one matrix per head, ``{"state": [B, H, D, D]}``.
    """

    name = "hgrn2"

    def __init__(self, config: LinearLlama3Config, layer: int) -> None:
        super().__init__(config, layer)
        self.num_heads, self.head_dim = config.num_heads, config.size_of_head
        self.number = config.layer_operators[:layer].count(self.name)
        inner = self.num_heads * self.head_dim
        self.q_proj, self.forget_proj, self.i_proj = (nn.Linear(config.dim, inner, bias=False) for _ in range(3))
        self.norm = RMSNorm(inner, config.norm_eps)
        self.out_proj = nn.Linear(inner, config.dim, bias=False)

    @classmethod
    def make_shared(cls, config: LinearLlama3Config) -> nn.Module | None:
        num_layers = config.layer_operators.count(cls.name)
        return BoundLogits(num_layers, config.num_heads * config.size_of_head) if num_layers > 1 else None

    def mix(self, x: Tensor, context: Context) -> tuple[Tensor, LayerMemory | None]:
        bound: Tensor | float = 0.0
        if self.number:
            bounds = hgrn2_lower_bounds(at_least_float32(context.shared[self.name]))
            bound = self._heads(bounds[self.number])
        g, k = hgrn2_log_decay(self._heads(self.forget_proj(x)), bound)
        i = self._heads(self.i_proj(x))
        memory = write_state("gla", k.to(i.dtype), i, {"g": g}, context, self.parallel)
        q = self._heads(F.silu(self.q_proj(x)))
        out: Tensor = self.out_proj(self.norm(memory.read(q, scale=1.0).flatten(2)))
        return out, memory_of(memory, context)

    def init_weights(self, initial: InitialWeights) -> None:
        initial.fill(self, residual=(self.out_proj,))

    def flops_per_token(self, seq_len: int) -> float:
        return operations_of_matrices(self) + operations_of_state(self.num_heads, self.head_dim, self.head_dim)

    def footprint(self) -> Footprint:
        # Of a layer with a bound; a mask of one byte a channel is a quarter of a number. The first layer keeps less.
        inner = self.num_heads * self.head_dim
        return Footprint(narrow=3 * inner, wide=13 * inner + inner // 4 + 1, state=inner * self.head_dim)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim))
