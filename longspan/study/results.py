"""What the cells of a study have come to: means over the seeds, with their standard deviations."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longspan.errors import ConfigError
from longspan.study.grid import Cell, Grid, Group
from longspan.train.run_folder import RunFolder


@dataclass(frozen=True)
class Spread:
    """A mean over seeds. deviation: the standard deviation of the seeds about it, over their number less one; None for one seed."""

    mean: float
    deviation: float | None
    num_seeds: int

    def __str__(self) -> str:
        return self.rounded(3)

    def rounded(self, digits: int) -> str:
        """Mean and deviation with that many decimals."""
        mean = f"{self.mean:,.{digits}f}"
        return mean if self.deviation is None else f"{mean} ± {self.deviation:,.{digits}f}"

    def differs_from(self, other: Spread) -> bool:
        """Whether the means are further from each other than both deviations together; never, where one of these is unknown."""
        if self.deviation is None or other.deviation is None:
            return False
        return abs(self.mean - other.mean) > self.deviation + other.deviation


def spread(values: Iterable[float | None]) -> Spread | None:
    """Of the values that are there; None if there are none."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Spread(statistics.fmean(known), statistics.stdev(known) if known[1:] else None, len(known))


@dataclass(frozen=True)
class Row:
    """The cells of a group that are done. loss: in nats per token; bits_per_byte: of text; accuracy: of recall."""

    group: Group
    num_done: int
    parameters: int | None
    loss: Spread | None
    bits_per_byte: Spread | None
    accuracy: Spread | None
    tokens_per_second: Spread | None


def read_summary(folder: Path) -> dict[str, Any] | None:
    """What the run in a folder has come to; None while it is not done.

    Raises:
        ConfigError: for a summary that cannot be read.
    """
    path = RunFolder(folder).summary_json
    if not path.is_file():
        return None
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(summary, dict) or "validation_loss" not in summary:
            raise ValueError("it has no validation_loss")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be read: {error}. Remove {folder}, and the study makes that training again"
        ) from error
    return summary


def folder_of(study: Path, cell: Cell) -> Path:
    """Where the run of a cell is."""
    return study / "cells" / cell.name


def rows_of(study: Path, grid: Grid) -> list[Row]:
    """A row for each group of the grid, in its order.

    Raises:
        ConfigError: for a summary that cannot be read.
    """
    return [_row(study, group, grid.seeds) for group in grid.groups]


def _row(study: Path, group: Group, seeds: Sequence[int]) -> Row:
    found = [read_summary(folder_of(study, Cell(group, seed))) for seed in seeds]
    done = [summary for summary in found if summary is not None]
    return Row(
        group,
        len(done),
        done[0].get("parameters") if done else None,
        *(
            spread(summary.get(key) for summary in done)
            for key in ("validation_loss", "validation_bits_per_byte", "validation_accuracy", "tokens_per_second")
        ),
    )
