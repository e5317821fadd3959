"""What enters segments, kept between the passes: for each of them, or for every n-th, and found again from there.

With S segments, n the distance of those whose memory is kept, and M the bytes of the tensors of a memory, at most
``(ceil(S / n) + n) · M`` are held. What all later segments read (keys and values) is held once, whatever n.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from longspan.errors import InputError
from longspan.streaming.adapters import Memory


class KeptMemory:
    """The memory that enters each segment, by the segment's number.

    every: n; 1 keeps all. goes_on: whether a segment goes on with what the one before it left; `start` makes what enters it
    otherwise. again: what is left by a segment, of its number and of what enters it, computed once more without gradients.
    """

    def __init__(
        self,
        every: int,
        goes_on: Callable[[int], bool],
        start: Callable[[], Any],
        again: Callable[[int, Any], Any],
    ) -> None:
        self._every = every
        self._goes_on = goes_on
        self._start = start
        self._again = again
        self._entering: dict[int, Memory] = {}
        self._between: list[int] = []
        self._without_tensors: dict[int, Memory] = {}

    def enter(self, segment: int, memory: Memory) -> None:
        """`memory` enters `segment`: called in order. The tensors between those that are kept last as long as no other is kept."""
        if segment % self._every == 0:
            for number in self._between:
                del self._entering[number]
            self._between.clear()
        else:
            self._between.append(segment)
        self._entering[segment] = memory.with_tensors(_tensors_of(memory))
        self._without_tensors[segment] = memory.with_tensors({})

    def entering(self, segment: int) -> Memory:
        """What enters a segment; computed from the nearest that is kept before it, where it is not kept itself."""
        # The same passes on every rank, whatever its documents: where weights are divided, each is a collective.
        first = segment if segment in self._entering else segment - segment % self._every
        for number in range(first, segment):
            left = self._again(number, self._entering[number])
            given = left if self._goes_on(number + 1) else self._start()
            self._entering[number + 1] = self._without_tensors[number + 1].with_tensors(_tensors_of(given))
        return self._entering[segment]

    def drop(self, segment: int) -> None:
        """Nothing needs what enters `segment` any more."""
        self._entering.pop(segment, None)
        self._without_tensors.pop(segment, None)


def _tensors_of(memory: Memory) -> dict[str, Tensor]:
    return {name: _of_its_own(x.detach()) for name, x in memory.tensors.items()}


def _of_its_own(x: Tensor) -> Tensor:
    """x in memory that holds nothing else: the last tokens of a segment would keep all of them."""
    return x.clone() if x.untyped_storage().nbytes() > x.numel() * x.element_size() else x


def check_same_tensors(segment: int, found: Memory, kept: Memory) -> None:
    """Raise InputError where a segment, computed once more, leaves other tensors than before."""
    first, second = ({name: tuple(x.shape) for name, x in memory.tensors.items()} for memory in (kept, found))
    if first != second:
        name = next(name for name in sorted({*first, *second}) if first.get(name) != second.get(name))
        raise InputError(
            f"stream(): segment {segment}, computed once more, remembers {name} of shape {second.get(name)}, and at first of shape "
            f"{first.get(name)}. The model must do the same in both passes: look for a hook or layer that counts its calls"
        )
