"""What the phases of one call share: its tiling and factors, and the states between chunks.

Shapes: as in `longspan.ops.decay` and `longspan.ops.matrices`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.layout import SequenceLayout
from longspan.ops.decay.factors import BlockFactors, Factors
from longspan.ops.decay.gate_gradient import GateGradient
from longspan.ops.matrices import times
from longspan.ops.tiling import ChunkBlock, Tiling


@dataclass(frozen=True)
class DecayCall:
    """What the phases of one call share beside tensors."""

    layout: SequenceLayout
    tiling: Tiling
    factors: Factors
    scale: float
    num_heads: int
    state_dtype: torch.dtype


def states_of(block: ChunkBlock, factors: BlockFactors, states: Tensor, incoming: Tensor | None) -> Tensor:
    """The states that enter the block's chunks ``[n, B, H, K, V]``, with what arrived from other ranks, times `factors.enter`."""
    state = states[block.slots]
    if incoming is not None:
        for chunks, segment in block.continuing:
            arrived = incoming[segment]
            if factors.prefix is not None:
                arrived = arrived * factors.prefix[chunks]
            if isinstance(block.slots, slice):
                # All chunks are of one piece, and `state` is a view of what others read.
                state = state + arrived
            else:
                state[chunks] += arrived
    return state if factors.enter is None else state * factors.enter


def put_states(states: Tensor, slots: slice | Tensor, values: Tensor, factor: Tensor | None) -> None:
    """Write ``values [n, B, H, K, V] · factor`` to the slots of ``states [num_slots, B, H, K, V]``."""
    if isinstance(slots, slice) and factor is not None:
        # bfloat16 products are widened first: an operation on two dtypes at once is slow on the CPU.
        torch.mul(values.to(states.dtype), factor, out=states[slots])
        return
    states[slots] = times(values, factor).to(states.dtype)


def gate_gradient(call: DecayCall, g: Tensor) -> GateGradient:
    """What collects ∂g."""
    return GateGradient(call.tiling, g, call.state_dtype)
