"""The random state of each segment, so that both of its forward passes draw the same numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

State = tuple[Tensor, Tensor | None]


def random_state(device: torch.device) -> State:
    """The state of torch's default generators, of the CPU and of `device`, if that is a GPU."""
    on_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), on_gpu


def is_same(one: State, other: State) -> bool:
    """Whether nobody has drawn between two states."""
    # Both are in host memory.
    return all(
        x is y or (x is not None and y is not None and torch.equal(x, y)) for x, y in zip(one, other, strict=True)
    )


class RandomStates:
    """The states in which segments were first computed, of the CPU and of `device`, if that is a GPU.

    As if each segment were computed once, in the order of its first pass: `leave` sets the state behind the last of them.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._begun: dict[int, State] = {}
        self._behind = random_state(self._device)

    @contextmanager
    def of(self, segment: int) -> Iterator[None]:
        """In the block a segment draws what it drew, or is the first to draw."""
        is_first = segment not in self._begun
        self._set(self._begun.setdefault(segment, self._behind))
        yield
        if is_first:
            self._behind = random_state(self._device)
            if is_same(self._behind, self._begun[segment]):
                # Nobody has drawn: one copy for all segments.
                self._behind = self._begun[segment]

    def leave(self) -> None:
        """The state behind all segments that were computed."""
        self._set(self._behind)

    def _set(self, state: State) -> None:
        on_cpu, on_gpu = state
        torch.set_rng_state(on_cpu)
        if on_gpu is not None:
            torch.cuda.set_rng_state(on_gpu, self._device)
