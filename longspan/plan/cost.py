"""What a topology costs: time, bytes, messages and steps, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DirectionCost:
    """One direction of an exchange.

    seconds: from the start until the last rank has what it needs.
    at_wait: the part of it that is computed where the caller waits, so that nothing hides it.
    bytes_sent, num_messages: of the rank that sends most, for a single document. num_steps: messages one after another.
    """

    seconds: float
    at_wait: float
    bytes_sent: int
    num_messages: int
    num_steps: int

    def exposed(self, compute_seconds: float) -> float:
        """Seconds that are left when the exchange runs beside a computation of `compute_seconds`."""
        return self.at_wait + max(0.0, self.seconds - self.at_wait - compute_seconds)


@dataclass(frozen=True)
class Cost:
    """What one exchange costs with a topology; num_blocks is set where the topology has blocks."""

    topology: str
    forward: DirectionCost
    backward: DirectionCost
    num_blocks: int | None = None

    @property
    def seconds(self) -> float:
        """Forward and backward."""
        return self.forward.seconds + self.backward.seconds

    @property
    def bytes_sent(self) -> int:
        return self.forward.bytes_sent + self.backward.bytes_sent

    @property
    def num_messages(self) -> int:
        return self.forward.num_messages + self.backward.num_messages
