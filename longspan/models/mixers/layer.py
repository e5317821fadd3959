"""What a mixer needs to be a layer of a config: `LayerMixer`; and what those with a memory state have in common.

Shapes: B batch rows, T tokens of this rank, C channels of the residual stream, H heads, K key size, V value size.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from longspan.attention import linear
from longspan.attention.linear import Given, LinearMemory
from longspan.attention.normalized import NormalizedMemory
from longspan.attention.opaque import OpaqueMemory
from longspan.models.mixers.mixer import Context, LayerMemory, ParallelOptions, SequenceMixer
from longspan.ops.delta.form import DEFAULT_CHUNK_SIZE

if TYPE_CHECKING:
    from longspan.models.config import LinearLlama3Config


@dataclass(frozen=True)
class Footprint:
    """What a layer's mixer takes in training, in numbers: `longspan plan train` adds them up.

    narrow: saved for backward of a token, in the dtype of the layer. wide: the same in float32 always. state: of a memory state of
    one row of the batch; 0 for a mixer that has none. transition: of what is sent beside a state, where that is a matrix, too: the
    mixer is a delta rule then, which saves a state at every 64 tokens. halo: what a convolution is sent for a segment, in the
    dtype of the layer.
    """

    narrow: int
    wide: int
    state: int
    transition: int = 0
    halo: int = 0


class LayerMixer(SequenceMixer):
    """The interface between a config and a mixer that its layers can be: listed in `longspan.models.MIXERS`, by its name.

    It is made as ``Mixer(config, layer)``, of the layer's number, from 0.
    """

    name: ClassVar[str]
    """What `operator` and `pattern` of a config call it."""

    @abstractmethod
    def __init__(self, config: LinearLlama3Config, layer: int) -> None:
        super().__init__()

    @classmethod
    def check(cls, config: LinearLlama3Config) -> None:
        """Raise ConfigError where a config's sizes make no such layer."""

    @classmethod
    def make_shared(cls, config: LinearLlama3Config) -> nn.Module | None:
        """What all layers of this kind learn together, or None: called without arguments, it gives their `Context.shared`."""
        return None

    def footprint(self) -> Footprint | None:
        """What the layer takes in training; None where nobody has counted it."""
        return None


def write_state(
    operator: str, k: Tensor, v: Tensor, gates: Given, context: Context, parallel: ParallelOptions
) -> LinearMemory | OpaqueMemory:
    """Write the tokens into a layer's memory state, after what it remembers, and start the exchange; read it with ``.read(q)``.

    Args:
        operator: one of `longspan.ops.variants.VARIANTS`.
        k: ``[B, T, H_k, K]``.
        v: ``[B, T, H, V]``.
        gates: by name, log decays among them never above 0 by how they were made.
    """
    return linear.write_linear(
        operator,
        k,
        v,
        gates,
        initial_state=context.remembered("state"),
        output_final_state=context.outputs_memory,
        layout=context.layout,
        exchange=parallel.exchange,
        has_safe_gates=True,
    )


def memory_of(
    written: LinearMemory | OpaqueMemory | NormalizedMemory, context: Context, taps: Tensor | None = None
) -> LayerMemory | None:
    """What a layer remembers: its state, ``{"state": [B, H, K, V]}``, and the last inputs of its convolution; None if not asked."""
    if not context.outputs_memory:
        return None
    state = {"state": context.of_its_own(written.final_state())}
    return LayerMemory(state if taps is None else state | {"taps": taps})


def squares_of_delta_rule(num_heads: int) -> int:
    """Float32 numbers of a token in the two chunk × chunk matrices that a delta rule saves: `Footprint.wide`."""
    return 2 * DEFAULT_CHUNK_SIZE * num_heads


def operations_of_state(num_heads: int, key_size: int, value_size: int, *, erases: bool = False) -> float:
    """Operations of forward and backward for one token that writes into a memory state and reads it.

    Two products of K × V forward, and three for a delta rule, which reads what it erases (`erases`); each twice more in backward.
    In the recurrent form; what a chunk form computes inside its chunks comes on top.
    """
    return (18.0 if erases else 12.0) * num_heads * key_size * value_size
