"""What the layers of delta rules have in common: projections, a short convolution, keys of length 1, a norm behind the state.

Shapes: B batch rows, T tokens of this rank, C channels of the residual stream, H heads, K key size, V value size.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from longspan.features import unit_length
from longspan.models.gates import WriteStrength
from longspan.models.initial import InitialWeights
from longspan.models.mixers.convolution import ShortConvolution
from longspan.models.mixers.layer import (
    Footprint,
    LayerMixer,
    memory_of,
    operations_of_state,
    squares_of_delta_rule,
    write_state,
)
from longspan.models.mixers.mixer import Context, LayerMemory, operations_of_matrices

if TYPE_CHECKING:
    from longspan.models.config import LinearLlama3Config


class DeltaLayer(LayerMixer):
    """o = out(norm_per_head(read(q, write(k, v)))), q, k and v through a convolution of 4 taps and silu, q and k then of length 1.

    A kind of it says which `operator` writes the state, how (`gates`), and what the norm is gated by (`output_gate`). It registers
    its modules in the order in which their weights are drawn: ``super().__init__`` has made the projections of q, k and v; then
    what is its own, around `add_convolution` and before `add_output`.

    It remembers ``{"state": [B, H, K, V], "taps": [B, 3, H · (2 K + V)]}``.
    """

    operator: ClassVar[str]
    """One of `longspan.ops.variants.VARIANTS`, a delta rule."""
    value_share: ClassVar[int] = 1
    """Channels of values of a head for each of its keys'."""

    convolution: ShortConvolution
    strength: WriteStrength
    norm: nn.Module
    out_proj: nn.Linear

    def __init__(self, config: LinearLlama3Config, layer: int) -> None:
        super().__init__(config, layer)
        self.num_heads, self.key_size = config.num_heads, config.size_of_head
        self.value_size = self.value_share * self.key_size
        self.num_keys, self.num_values = self.num_heads * self.key_size, self.num_heads * self.value_size
        self.q_proj, self.k_proj = (nn.Linear(config.dim, self.num_keys, bias=False) for _ in range(2))
        self.v_proj = nn.Linear(config.dim, self.num_values, bias=False)

    def add_convolution(self, config: LinearLlama3Config) -> None:
        """The convolution, and how much a token replaces."""
        self.convolution = ShortConvolution(2 * self.num_keys + self.num_values)
        self.strength = WriteStrength(config.dim, self.num_heads)

    def add_output(self, config: LinearLlama3Config, norm: nn.Module) -> None:
        """The norm of a head's ``[V]`` channels, and what writes into the residual stream."""
        self.norm = norm
        self.out_proj = nn.Linear(self.num_values, config.dim, bias=False)

    @abstractmethod
    def gates(self, x: Tensor) -> dict[str, Tensor]:
        """What the operator takes beside q, k and v, by name."""

    def output_gate(self, x: Tensor) -> Tensor | None:
        """What the norm takes beside what was read, ``[B, T, H, V]``; None takes nothing."""
        return None

    def mix(self, x: Tensor, context: Context) -> tuple[Tensor, LayerMemory | None]:
        inputs = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)
        inputs, taps = self.convolution(inputs, context)
        sizes = (self.num_keys, self.num_keys, self.num_values)
        q, k, v = (self._heads(part) for part in inputs.split(sizes, dim=-1))
        memory = write_state(self.operator, unit_length(k), v, self.gates(x), context, self.parallel)
        gate = self.output_gate(x)
        found = memory.read(unit_length(q))
        found = self.norm(found) if gate is None else self.norm(found, gate)
        out: Tensor = self.out_proj(found.flatten(2))
        return out, memory_of(memory, context, taps)

    def init_weights(self, initial: InitialWeights) -> None:
        initial.fill(self, residual=(self.out_proj,))

    def flops_per_token(self, seq_len: int) -> float:
        state = operations_of_state(self.num_heads, self.key_size, self.value_size, erases=True)
        return operations_of_matrices(self) + self.convolution.flops_per_token + state

    def footprint_of(self, narrow: int, wide: int) -> Footprint:
        """The layer's, of what it saves beside its delta rule: see `Footprint`."""
        return Footprint(
            narrow,
            wide + squares_of_delta_rule(self.num_heads),
            state=self.num_keys * self.value_size,
            transition=self.num_keys * self.key_size,
            halo=self.convolution.halo,
        )

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))
