"""What a rank is doing, so that an error says where it happened."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from longspan.faults import reached
from longspan.launch import Place

PHASES = {
    "starting": "start",
    "meeting the other ranks": "meet",
    "opening the run folder": "open",
    "preparing the data": "prepare",
    "building the model": "build",
    "measuring the device": "device",
    "checking the first batch": "check",
    "starting to train": "begin",
    "reading a batch": "data",
    "computing forward": "forward",
    "computing backward": "backward",
    "summing gradients": "sum",
    "updating the weights": "update",
    "comparing replicas": "replicas",
    "validating": "validate",
    "saving a checkpoint": "save",
    "writing the results": "results",
    "measuring one process": "alone",
    "ending": "end",
}
"""What a rank may be doing, and the point's name for `longspan.faults`."""


class RunPhase:
    """The present activity and, once steps are made, the step it belongs to (counted from 1)."""

    def __init__(self) -> None:
        self.step: int | None = None
        self.detail = ""
        """Where in the activity, where that is long; empty as it begins."""
        self.since = time.monotonic()
        self._name = "starting"

    @property
    def name(self) -> str:
        """What a person reads: a key of `PHASES`."""
        return self._name

    @name.setter
    def name(self, name: str) -> None:
        self._name = name
        self.detail = ""
        self.since = time.monotonic()
        reached(PHASES[name], self.step)

    def describe(self, place: Place) -> str:
        """Which rank this is, in which step, doing what."""
        return f"rank {place.rank} of {place.world_size}, {self.where}"

    @property
    def where(self) -> str:
        """In which step, doing what."""
        doing = f"while {self.name}" + (f", {self.detail}" if self.detail else "")
        return doing if self.step is None else f"step {self.step}, {doing}"

    @contextlib.contextmanager
    def noted(self, place: Place) -> Iterator[None]:
        """Add rank, step and activity to an error that passes."""
        try:
            yield
        except Exception as error:
            error.add_note(self.describe(place))
            raise
