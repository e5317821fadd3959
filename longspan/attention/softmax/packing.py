"""Keys and values for their way between ranks: packed token by token, taken in runs.

Shapes: L tokens of a buffer, B batch, H_kv key and value heads, D head dimension of keys, D_v of values. Packed keys and values,
and packed gradients of both, are [L, B, H_kv · (D + D_v)], of each token and row the keys of all heads and then the values: any
run of tokens is one piece of memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longspan.layout.visibility import Run, length, touches

MOSTLY = 0.75
"""A view keeps all of its memory: tokens that are less than this part of a buffer are copied instead."""


def pack_keys(k: Tensor, v: Tensor, runs: Sequence[Run]) -> Tensor:
    """The tokens of `runs`, one run after another, of k and v; in the dtype of k."""
    packed = k.new_empty((length(runs), k.shape[0], packed_width(k, v)))
    pack_into(packed, k, v, runs)
    return packed


def packed_width(k: Tensor, v: Tensor) -> int:
    """H_kv · (D + D_v), the numbers of one token and row of k and v."""
    return k.shape[2] * (k.shape[3] + v.shape[3])


def pack_into(packed: Tensor, k: Tensor, v: Tensor, runs: Sequence[Run]) -> None:
    """`pack_keys`, into a tensor that is there."""
    offset = 0
    for start, stop in runs:
        for part, x in zip(unpack(packed[offset : offset + stop - start], k, v), (k, v), strict=True):
            part.copy_(x[:, start:stop])
        offset += stop - start


def unpack(packed: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Views [B, L, H_kv, D] and [B, L, H_kv, D_v] of packed keys and values with the heads of k and v."""
    heads, dim = k.shape[2:]
    parts = packed.transpose(0, 1).split((heads * dim, heads * v.shape[3]), dim=2)
    return parts[0].unflatten(2, (heads, dim)), parts[1].unflatten(2, (heads, v.shape[3]))


def add_packed(grads: tuple[Tensor, Tensor], runs: Sequence[Run], packed: Tensor) -> None:
    """Add packed gradients, one run after another, to the tokens of `runs` of dk [B, T, H_kv, D] and dv [B, T, H_kv, D_v]."""
    offset = 0
    for start, stop in runs:
        for grad, part in zip(grads, unpack(packed[offset : offset + stop - start], *grads), strict=True):
            grad[:, start:stop] += part
        offset += stop - start


def take_runs(packed: Tensor, runs: Sequence[Run]) -> Tensor:
    """The tokens of `runs`, one run after another; a view where they lie so and are most of the tensor."""
    runs = [run for run in runs if run[0] < run[1]]
    if runs and touches(runs) and runs[-1][1] - runs[0][0] >= MOSTLY * packed.shape[0]:
        return packed[runs[0][0] : runs[-1][1]]
    return torch.cat([packed[start:stop] for start, stop in runs]) if runs else packed.new_empty((0, *packed.shape[1:]))
