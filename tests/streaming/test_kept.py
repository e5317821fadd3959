"""What enters segments is kept for every n-th, found again from there, and no more of it is held than is said."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from longspan.streaming.kept import KeptMemory

NUM_SEGMENTS = 23
BEGINS = 12
"""A segment that a document begins with."""


class Count:
    """A memory of one number, which counts the segments of its document; all of its kind are known."""

    def __init__(self, tensors: Mapping[str, Tensor], known: list[weakref.ref[Tensor]]) -> None:
        self.tensors, self._known = tensors, known
        known.extend(map(weakref.ref, tensors.values()))

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Count:
        return Count(tensors, self._known)

    def sent_back(self, kept: Any) -> tuple[tuple[Tensor, Tensor], ...]:
        return ()


@pytest.mark.parametrize("every", [1, 2, 5, 23, 40])
def test_each_segment_is_entered_by_what_was_left_and_as_little_is_held_as_is_said(every: int) -> None:
    known: list[weakref.ref[Tensor]] = []
    passes: list[int] = []

    def left_by(segment: int, memory: Count) -> Count:
        passes.append(segment)
        return Count({"count": memory.tensors["count"] + 1}, known)

    def goes_on(segment: int) -> bool:
        return segment not in (0, BEGINS)

    def num_held() -> int:
        return sum(kept() is not None for kept in known)

    def start() -> Count:
        return Count({"count": torch.zeros(1)}, known)

    kept, most = KeptMemory(every, goes_on, start, left_by), 0
    memory = start()
    for segment in range(NUM_SEGMENTS):
        kept.enter(segment, memory)
        memory = left_by(segment, memory) if goes_on(segment + 1) else start()
        # But for what is on its way, which this segment was given and has left.
        most = max(most, num_held() - 2)
    del memory
    passes.clear()
    for segment in reversed(range(NUM_SEGMENTS)):
        want = segment - (BEGINS if segment >= BEGINS else 0)
        assert kept.entering(segment).tensors["count"].item() == want
        most = max(most, num_held())
        kept.drop(segment)
    assert most <= -(-NUM_SEGMENTS // every) + every
    assert num_held() == 0
    # Each that is not kept is found again once, but for those behind the last that is.
    behind_last = (NUM_SEGMENTS - 1) % every
    assert len(passes) == NUM_SEGMENTS - -(-NUM_SEGMENTS // every) - behind_last
