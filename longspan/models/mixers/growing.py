"""Tensors that grow by a token at a time, in memory that has room for more: what is there already is not copied for each.

Shapes: B batch rows, L tokens so far, N new tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Room:
    """Memory ``[B, capacity, ...]`` whose first `stop` tokens are written, and never again."""

    buffer: Tensor
    stop: int


@dataclass(frozen=True)
class Grown:
    """Where a tensor ends in the room that it is a view of."""

    room: Room
    stop: int

    def has_room_for(self, num_tokens: int) -> bool:
        """Whether tokens can be written behind this tensor: nobody went on from it before, and the room is large enough."""
        buffer = self.room.buffer
        is_last = self.stop == self.room.stop and self.stop + num_tokens <= buffer.shape[1]
        # What was made in inference mode may be changed there alone.
        return is_last and buffer.is_inference() == torch.is_inference_mode_enabled()


def append(before: Tensor | None, grown: Grown | None, new: Tensor, most: int | None) -> tuple[Tensor, Grown]:
    """`before` ``[B, L, ...]`` and `new` ``[B, N, ...]`` together, of which the last `most` tokens are kept; without gradients.

    Args:
        before: None is none. It stays as it is, as does every tensor that was returned before: several may go on from one.
        grown: what an earlier call returned with `before`; None is a tensor that was made otherwise.
        most: None is all.

    Returns:
        A tensor, and what the next call is given with it.

    A tensor that was made otherwise is copied once to one of just its size, as it may not grow further, and once more, twice as
    large, when it does.
    """
    new = new if most is None else new[:, new.shape[1] - min(most, new.shape[1]) :]
    num_new, num_before = new.shape[1], 0 if before is None else before.shape[1]
    num_kept = num_before if most is None else min(num_before, most - num_new)
    total = num_kept + num_new
    if grown is not None and grown.has_room_for(num_new):
        room = grown.room
        # By `data`: the tokens that other views show do not change, and the counter of changes is theirs, too.
        room.buffer.data[:, room.stop : room.stop + num_new] = new
        room.stop += num_new
    else:
        capacity = total if grown is None else 2 * total
        room = Room(new.new_empty((new.shape[0], capacity, *new.shape[2:])), total)
        if before is not None:
            room.buffer[:, :num_kept] = before[:, num_before - num_kept :]
        room.buffer[:, num_kept:total] = new
    return room.buffer[:, room.stop - total : room.stop], Grown(room, room.stop)
