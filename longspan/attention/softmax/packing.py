"""Keys and values for their way between ranks: packed token by token, taken in runs.

Shapes: L tokens of a buffer, B batch, H_kv key and value heads, D head dimension. Packed keys and values, and packed
gradients of both, are [L, B, 2, H_kv, D]: any run of tokens is one piece of memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longspan.layout.visibility import Run, length, touches

MOSTLY = 0.75
"""A view keeps all of its memory: tokens that are less than this part of a buffer are copied instead."""


def pack_keys(k: Tensor, v: Tensor, runs: Sequence[Run]) -> Tensor:
    """The tokens of `runs`, one run after another, of k and v [B, T, H_kv, D]; in the dtype of k."""
    packed = k.new_empty((length(runs), k.shape[0], 2, *k.shape[2:]))
    pack_into(packed, k, v, runs)
    return packed


def pack_into(packed: Tensor, k: Tensor, v: Tensor, runs: Sequence[Run]) -> None:
    """`pack_keys`, into a tensor that is there."""
    offset = 0
    for start, stop in runs:
        for slot, x in enumerate((k, v)):
            packed[offset : offset + stop - start, :, slot] = x[:, start:stop].transpose(0, 1)
        offset += stop - start


def unpack(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Views [B, L, H_kv, D] of packed keys and values."""
    k, v = packed.transpose(0, 1).unbind(2)
    return k, v


def add_packed(grads: tuple[Tensor, Tensor], runs: Sequence[Run], packed: Tensor) -> None:
    """Add packed gradients, one run after another, to the tokens of `runs` of dk and dv [B, T, H_kv, D]."""
    offset = 0
    for start, stop in runs:
        for slot, grad in enumerate(grads):
            grad[:, start:stop] += packed[offset : offset + stop - start, :, slot].transpose(0, 1)
        offset += stop - start


def take_runs(packed: Tensor, runs: Sequence[Run]) -> Tensor:
    """The tokens of `runs`, one run after another; a view where they lie so and are most of the tensor."""
    runs = [run for run in runs if run[0] < run[1]]
    if runs and touches(runs) and runs[-1][1] - runs[0][0] >= MOSTLY * packed.shape[0]:
        return packed[runs[0][0] : runs[-1][1]]
    return torch.cat([packed[start:stop] for start, stop in runs]) if runs else packed.new_empty((0, *packed.shape[1:]))
