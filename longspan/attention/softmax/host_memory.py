"""Tensors that are kept in host memory and copied to the device for each use, one ahead: `HostMemory`, `one_ahead`.

On CUDA host memory is pinned, and copies either way run on a stream of their own, in the order in which they are asked for: what is
computed waits for the copies that it needs, and the host waits for none. Elsewhere a copy is made at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Fetched:
    """Copies on their way to the device; `wait` gives them to what is computed next."""

    _copies: tuple[Tensor, ...]
    _arrived: Any = None

    def wait(self) -> tuple[Tensor, ...]:
        """The copies."""
        if self._arrived is not None:
            stream = torch.cuda.current_stream(self._copies[0].device)
            stream.wait_event(self._arrived)
            for x in self._copies:
                x.record_stream(stream)
        return self._copies


class HostMemory:
    """Host memory for tensors of one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None

    def put(self, x: Tensor) -> Tensor:
        """A copy of `x` in host memory, laid out as it is."""
        host = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, pin_memory=self._stream is not None)
        self.store(host, x)
        return host

    def store(self, host: Tensor, x: Tensor) -> None:
        """Copy `x`, as what was computed so far makes it, into `host`."""
        with self._copying(waits=True):
            host.copy_(x, non_blocking=True)
        if self._stream is not None:
            x.record_stream(self._stream)

    def fetch(self, *hosts: Tensor) -> Fetched:
        """Start to copy tensors to the device."""
        with self._copying(waits=False):
            copies = []
            for host in hosts:
                x = torch.empty_strided(host.shape, host.stride(), dtype=host.dtype, device=self.device)
                copies.append(x.copy_(host, non_blocking=True))
        return Fetched(tuple(copies), None if self._stream is None else self._stream.record_event())

    def _copying(self, waits: bool) -> AbstractContextManager[Any]:
        """Copies in the block run on the stream for them; `waits`: behind what was computed so far."""
        if self._stream is None:
            return nullcontext()
        if waits:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self._stream)


def one_ahead(items: Iterable[T], start: Callable[[T], R]) -> Iterator[R]:
    """``start(item)`` of each, the next one's begun before one is handed out, and none before the first is asked for."""
    begun: list[R] = []
    for item in items:
        begun.append(start(item))
        if len(begun) > 1:
            yield begun.pop(0)
    yield from begun
