"""Counting what exchanges send: a recorder that is on inside a ``with`` block.

What counts for a collective are the bytes that the rank has for other ranks, as the topology's formula says, whatever a particular
backend does with them. Its messages are the parts for other ranks that are not empty.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Event:
    """One collective or message: name, phase, bytes sent by this rank, when it was started (seconds, `time.perf_counter`).

    num_messages: how many messages to other ranks it stands for.
    """

    name: str
    phase: str
    bytes_sent: int
    started: float
    num_messages: int = 1


@dataclass
class Traffic:
    """What this rank sent, and how long it waited, while recording."""

    events: list[Event] = field(default_factory=list)
    wait_seconds: float = 0.0
    flights: list[tuple[float, float]] = field(default_factory=list)
    """From when to when exchanges were under way, as far as this rank waited for their end (`time.perf_counter`)."""

    @property
    def num_collectives(self) -> int:
        """Number of collectives, and of messages sent outside one, that were started."""
        return len(self.events)

    @property
    def exchange_seconds(self) -> float:
        """Seconds in which at least one exchange was under way, hidden or not; `wait_seconds` is the part that was not."""
        total, reached = 0.0, float("-inf")
        for begun, ended in sorted(self.flights):
            total += max(0.0, ended - max(begun, reached))
            reached = max(reached, ended)
        return total

    @property
    def num_messages(self) -> int:
        """Number of messages that this rank sent to other ranks."""
        return sum(event.num_messages for event in self.events)

    @property
    def bytes_sent(self) -> int:
        """Bytes that this rank sent to other ranks."""
        return sum(event.bytes_sent for event in self.events)

    def count(self, phase: str) -> int:
        """Number of collectives of a phase, ``"forward"`` or ``"backward"``."""
        return sum(event.phase == phase for event in self.events)

    def of_phase(self, phase: str) -> Traffic:
        """The events of one phase, ``"forward"`` or ``"backward"``; waiting is not counted by phase."""
        return Traffic([event for event in self.events if event.phase == phase])


# Recorders are observers of a process, like a profiler: a collective may be started by autograd's own threads, or by the thread
# that works beside the main one, which see no context of the caller.
_recorders: list[Traffic] = []


@contextmanager
def record_traffic() -> Iterator[Traffic]:
    """Record the collectives of longspan on this rank inside the block; blocks may nest."""
    traffic = Traffic()
    _recorders.append(traffic)
    try:
        yield traffic
    finally:
        # By identity: two recorders that saw the same are equal.
        _recorders[:] = [recorder for recorder in _recorders if recorder is not traffic]


@contextmanager
def unrecorded() -> Iterator[None]:
    """Hide what this process sends and waits for in the block from the recorders: measurements of the network, not exchanges."""
    hidden = _recorders[:]
    _recorders.clear()
    try:
        yield
    finally:
        _recorders[:] = hidden


def note_collective(name: str, phase: str, bytes_sent: int, num_messages: int = 1) -> None:
    """Tell the recorders of a collective or a message that is about to start."""
    event = Event(name, phase, bytes_sent, time.perf_counter(), num_messages)
    for traffic in _recorders:
        traffic.events.append(event)


@contextmanager
def waiting() -> Iterator[None]:
    """Count the time of the block as waiting for other ranks."""
    begun = time.perf_counter()
    try:
        yield
    finally:
        ended = time.perf_counter()
        for traffic in _recorders:
            traffic.wait_seconds += ended - begun
            traffic.flights.append((begun, ended))


def note_flight(begun: float) -> None:
    """Tell the recorders of an exchange that has just ended; begun: when it was started (`time.perf_counter`)."""
    ended = time.perf_counter()
    for traffic in _recorders:
        traffic.flights.append((begun, ended))
