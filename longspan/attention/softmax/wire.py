"""Keys and values on their way between ranks: packed token by token, sent in runs, put in order where they arrive.

Shapes: L tokens of a buffer, B batch, H_kv key and value heads, D head dimension. Packed keys and values, and packed
gradients of both, are [L, B, 2, H_kv, D]: any run of tokens is one piece of memory.

Messages are those of an all-to-all whose parts are empty but between ranks that exchange tokens. It keeps the number of
operations equal on all ranks, as `longspan.exchange.halo` explains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longspan.attention.softmax.blocks import Run, length, touches
from longspan.exchange.traffic import note_collective, waiting
from longspan.layout import SequenceLayout

MOSTLY = 0.75
"""A view keeps all of its memory: tokens that are less than this part of a buffer are copied instead."""


@dataclass
class Flight:
    """A collective under way, and the memory it reads and writes."""

    work: Any
    received: Tensor
    sent: Tensor

    def wait(self) -> Tensor:
        """What arrived."""
        with waiting():
            self.work.wait()
        return self.received


def pack(k: Tensor, v: Tensor, runs: Sequence[Run]) -> Tensor:
    """The tokens of `runs`, one run after another, of k and v [B, T, H_kv, D]; in the dtype of k."""
    packed = k.new_empty((length(runs), k.shape[0], 2, *k.shape[2:]))
    pack_into(packed, k, v, runs)
    return packed


def pack_into(packed: Tensor, k: Tensor, v: Tensor, runs: Sequence[Run]) -> None:
    """`pack`, into a tensor that is there."""
    offset = 0
    for start, stop in runs:
        for slot, x in enumerate((k, v)):
            packed[offset : offset + stop - start, :, slot] = x[:, start:stop].transpose(0, 1)
        offset += stop - start


def unpack(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Views [B, L, H_kv, D] of packed keys and values."""
    k, v = packed.transpose(0, 1).unbind(2)
    return k, v


def take(packed: Tensor, runs: Sequence[Run]) -> Tensor:
    """The tokens of `runs`, one run after another; a view where they lie so and are most of the tensor."""
    runs = [run for run in runs if run[0] < run[1]]
    if runs and touches(runs) and runs[-1][1] - runs[0][0] >= MOSTLY * packed.shape[0]:
        return packed[runs[0][0] : runs[-1][1]]
    return torch.cat([packed[start:stop] for start, stop in runs]) if runs else packed.new_empty((0, *packed.shape[1:]))


def swap(
    sent: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int], layout: SequenceLayout, phase: str
) -> Flight:
    """Start an all-to-all of rows of `sent`: as many to each rank, and from each, as the sizes say.

    What arrives lies rank by rank.
    """
    received = sent.new_empty((sum(receive_sizes), *sent.shape[1:]))
    others = [size for rank, size in enumerate(send_sizes) if rank != layout.rank]
    bytes_a_row = sent.element_size() * sent[:1].numel() if sent.shape[0] else 0
    note_collective("all_to_all", phase, sum(others) * bytes_a_row, sum(size > 0 for size in others))
    work = dist.all_to_all_single(
        received, sent, list(receive_sizes), list(send_sizes), group=layout.group, async_op=True
    )
    return Flight(work, received, sent)
