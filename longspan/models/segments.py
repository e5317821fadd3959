"""What a caller is told between passes over segments of time: of a prompt, or of a step of training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class SegmentDone:
    """A pass over one segment is done.

    kind: ``"forward"`` is the first pass, from segment 0 on, and the only one of a prompt; ``"backward"`` the second, from the last
    one to segment 0; ``"again"`` a forward pass for what was not kept. segment: its number, from 0.
    """

    kind: Literal["forward", "again", "backward"]
    segment: int
    num_segments: int


Between = Callable[[SegmentDone], None]
"""Called between passes; what it raises ends the step, whose gradients are then in part, or the prompt."""
