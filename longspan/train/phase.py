"""What a rank is doing, so that an error says where it happened."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from longspan.launch import Place


class RunPhase:
    """The present activity and, once steps are made, the step it belongs to (counted from 1)."""

    def __init__(self) -> None:
        self.name = "starting"
        self.step: int | None = None

    @contextlib.contextmanager
    def noted(self, place: Place) -> Iterator[None]:
        """Add rank, step and activity to an error that passes."""
        try:
            yield
        except Exception as error:
            step = "" if self.step is None else f", step {self.step}"
            error.add_note(f"rank {place.rank} of {place.world_size}{step}, while {self.name}")
            raise
