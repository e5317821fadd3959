"""Several tensors of some queries as one message of bytes.

Shapes: n queries. Tensors lie one behind another, each from a multiple of `ALIGNMENT` bytes on, so that each is a view of the
message.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

ALIGNMENT = 16


@dataclass(frozen=True)
class Part:
    """One tensor of a message: its dimensions before and behind that of the n queries, and its dtype."""

    before: tuple[int, ...]
    behind: tuple[int, ...]
    dtype: torch.dtype

    def shape(self, num_queries: int) -> tuple[int, ...]:
        """All dimensions."""
        return *self.before, num_queries, *self.behind

    def num_bytes(self, num_queries: int) -> int:
        """Without what stands behind it for the next one's sake."""
        return prod(self.shape(num_queries)) * self.dtype.itemsize


@dataclass(frozen=True)
class Message:
    """What is sent for each of a number of queries."""

    parts: tuple[Part, ...]

    def num_bytes(self, num_queries: int) -> int:
        """Bytes of a message."""
        return sum(_aligned(part.num_bytes(num_queries)) for part in self.parts)

    def pack(self, tensors: Sequence[Tensor], num_queries: int) -> Tensor:
        """The tensors, of the parts' shapes, as uint8 ``[num_bytes]``."""
        packed = torch.empty(self.num_bytes(num_queries), dtype=torch.uint8, device=tensors[0].device)
        for view, x in zip(self._views(packed, num_queries), tensors, strict=True):
            view.copy_(x)
        return packed

    def nothing(self, device: torch.device) -> Tensor:
        """The message for no query."""
        return torch.empty(0, dtype=torch.uint8, device=device)

    def unpack(self, packed: Tensor, num_queries: int) -> list[Tensor]:
        """Views of the message in the parts' shapes."""
        return list(self._views(packed, num_queries))

    def _views(self, packed: Tensor, num_queries: int) -> Iterator[Tensor]:
        offset = 0
        for part in self.parts:
            num_bytes = part.num_bytes(num_queries)
            yield packed[offset : offset + num_bytes].view(part.dtype).view(part.shape(num_queries))
            offset += _aligned(num_bytes)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
