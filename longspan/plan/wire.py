"""How numbers of states travel: their bytes, how far they may be off, and what it takes to code them. Arithmetic alone.

Numbers go head by head: a head's matrix ``[K, V]``, or the columns of it that are in one message, is coded by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

_SCALE_BYTES = 4
SHORT_INDEX = 2**15
"""Heads of at most so many numbers are indexed by 2 bytes, others by 4."""


@dataclass(frozen=True)
class WireFormat:
    """A way of a head's numbers over the wire.

    name: of the codec.
    number_bytes: of a number that is sent.
    worst_error: ‖what arrives − what was sent‖ / ‖what was sent‖ of a head's matrix, at most, for whatever finite numbers; but
        those below 1e-36 have scales of few digits.
    block: how many numbers share a scale of 4 bytes; 0 where there are no scales.
    kept: which share of the numbers is sent, each with its place; 1 where all are.
    passes: how many times as long as a fold of the same numbers, by its bandwidth, it takes to encode and decode them.
    starts: how many times as long as a fold, by its latency, that takes however few numbers a message has.
    """

    name: str
    number_bytes: int
    worst_error: float
    block: int = 0
    kept: float = 1.0
    passes: float = 1.0
    starts: float = 0.0

    def num_kept(self, numbers: int) -> int:
        """How many of a head's numbers are sent."""
        return numbers if self.kept == 1.0 else max(1, ceil(self.kept * numbers))

    def row_bytes(self, numbers: int) -> int:
        """Bytes of a head of so many numbers."""
        sent = self.num_kept(numbers)
        if self.kept < 1.0:
            return sent * (self.number_bytes + (2 if numbers <= SHORT_INDEX else 4))
        scales = -(-numbers // self.block) if self.block else 0
        return sent * self.number_bytes + scales * _SCALE_BYTES
