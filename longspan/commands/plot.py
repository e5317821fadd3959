"""``longspan plot``: figures of runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from longspan.commands.options import parse_options, print_lines_of
from longspan.errors import ConfigError

_DESCRIPTION = """Draw the loss, tokens per second and memory of one run or several, over each other, as a PNG.

Takes run folders or their metrics.jsonl, of runs that have ended or go on.
"""


@dataclass(frozen=True)
class Plot:
    """Which runs, and where the figure goes."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Run folders, or files like their metrics.jsonl."""
    out: str | None = None
    """The PNG to write; None is metrics.png in the run folder, or in this folder for several runs."""


def run(arguments: Sequence[str]) -> int:
    """Draw what the arguments ask for, and return the exit code."""
    options = parse_options(Plot, "plot", _DESCRIPTION, arguments)
    return print_lines_of(lambda: [plot(options)])


def plot(options: Plot) -> Path:
    """Draw the runs; return the path of the figure.

    Raises:
        ConfigError: for what is no run, a run without steps, or a figure that cannot be written.
    """
    from longspan.train.figures import plot_runs, read_run

    if not options.runs:
        raise ConfigError("plot takes the runs to draw: longspan plot runs/a runs/b")
    runs = [read_run(Path(name)) for name in options.runs]
    alike = {name for name, count in Counter(run.name for run in runs).items() if count > 1}
    runs = [
        replace(run, name=given) if run.name in alike else run for run, given in zip(runs, options.runs, strict=True)
    ]
    path = Path("metrics.png")
    if options.out is not None:
        path = Path(options.out)
    elif len(runs) == 1 and Path(options.runs[0]).is_dir():
        path = Path(options.runs[0]) / path
    try:
        plot_runs(runs, path)
    except (OSError, ValueError) as error:
        # matplotlib raises ValueError for an ending of which it knows no format.
        raise ConfigError(f"{path} could not be written: {error}. Give another file: --out FILE.png") from error
    return path
