"""``longspan study``: mixers beside each other, pure and with softmax layers among them, on text and on associative recall."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from longspan.commands.options import parse_options, refuse
from longspan.errors import ConfigError, LongspanError
from longspan.launch import EXIT_DONE, num_cores

if TYPE_CHECKING:
    from longspan.study.grid import Grid
    from longspan.study.size import Size

_DESCRIPTION = """Train small models of each mixer, pure and with softmax layers among them, and set their losses beside each other.

  longspan study --out runs/study --size night
  longspan study --out runs/short --mixers gla mamba2 softmax --ratios pure 1/4 --tasks recall --seeds 0 1
  longspan study --out runs/study --report_only

Each is a run of longspan train in a folder of its own, with the same budget. What is done is not done again: the same command goes
on with a study that was stopped or killed. Writes study.md, study.json and study.svg, beside the orders of LASP-2's tables 2 and 4.

Exit codes: 0 done, 1 some trainings failed, 2 refused (the message says how to mend it), 75 stopped by a signal, 128 + n by a
second signal n.
"""


@dataclass(frozen=True)
class StudyOptions:
    """Which trainings, how large, and where."""

    out: str | None = None
    """Folder of the study."""
    size: Literal["short", "night"] = "short"
    """How large models and budgets are: to try it (short), or so that all trainings take two cores a night (night)."""
    mixers: tuple[str, ...] = ()
    """Mixers of the linear layers, and softmax for a model of softmax layers alone; none is all."""
    ratios: tuple[str, ...] = ()
    """Shares of softmax layers, of pure, 1/8, 1/4 and 1/2; none is all."""
    tasks: tuple[str, ...] = ()
    """text, recall; none is both."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of initial weights, and of what is trained on."""
    jobs: int | None = None
    """Trainings at the same time, which share the cores; None is one for each core."""
    threads: int | None = None
    """Threads of a training; None divides the cores between the jobs."""
    report_only: bool = False
    """Train nothing: write the report of what is done."""
    dim: int | None = None
    """Width of the models; this and the following are those of the size if they are not given."""
    num_heads: int | None = None
    """Heads of a layer."""
    hidden_dim: int | None = None
    """Width of the feed-forward layers."""
    lr: float | None = None
    """Highest learning rate."""
    text_source: tuple[str, ...] = ()
    """Where the text comes from, as data.source of longspan train; none is this Python's standard library."""
    text_max_bytes: int | None = None
    """Bytes of text that are read."""
    text_vocab_size: int | None = None
    """Size of the BPE's vocabulary."""
    text_steps: int | None = None
    """Optimizer steps on text."""
    text_seq_len: int | None = None
    """Tokens of a sequence of text."""
    text_batch_tokens: int | None = None
    """Tokens of a batch of text."""
    recall_steps: int | None = None
    """Optimizer steps on associative recall."""
    recall_seq_len: int | None = None
    """Tokens of a sequence of associative recall."""
    recall_batch_tokens: int | None = None
    """Tokens of a batch of associative recall."""
    recall_pairs: int | None = None
    """Pairs of a key and a value in a sequence."""
    recall_vocab_size: int | None = None
    """Number of words that keys and values are of."""


def run(arguments: Sequence[str]) -> int:
    """Make the study that the arguments ask for, and return the exit code."""
    options = parse_options(StudyOptions, "study", _DESCRIPTION, arguments, use_underscores=True)
    try:
        return study(options)
    except LongspanError as error:
        return refuse(error)


def study(options: StudyOptions) -> int:
    """Make the study, report it, and return the exit code.

    Raises:
        LongspanError: for what the user can mend.
    """
    from longspan.study.report import write_report
    from longspan.study.run import Study

    if options.out is None:
        raise ConfigError("study needs a folder for its trainings and what they come to: --out runs/study")
    jobs = num_cores() if options.jobs is None else options.jobs
    if jobs < 1:
        raise ConfigError(f"jobs must be at least 1; got {jobs}")
    threads = max(1, num_cores() // jobs) if options.threads is None else options.threads
    folder, grid, size = Path(options.out), _grid(options), _size(options)
    if options.report_only:
        size, grid = _begun(folder, grid)
        code = EXIT_DONE
    else:
        code = Study(folder, grid, size, jobs, threads, _say).run()
    for path in write_report(folder, grid, size):
        _say(f"written: {path}")
    return code


def _grid(options: StudyOptions) -> Grid:
    from longspan.study.grid import Grid

    given = {name: getattr(options, name) for name in ("mixers", "ratios", "tasks")}
    return Grid(seeds=options.seeds, **{name: values for name, values in given.items() if values})


def _size(options: StudyOptions) -> Size:
    from dataclasses import fields

    from longspan.study.size import SIZES

    size = SIZES[options.size]
    given = {entry.name: getattr(options, entry.name) for entry in fields(size)}
    return size.changed({name: value for name, value in given.items() if value != ()})


def _begun(folder: Path, grid: Grid) -> tuple[Size, Grid]:
    """The size of the study in a folder, and what of the grid was begun there."""
    from longspan.study.grid import Grid
    from longspan.study.results import folder_of
    from longspan.study.run import read_size

    size = read_size(folder)
    cells = [cell for cell in grid.cells if folder_of(folder, cell).is_dir()]
    if size is None or not cells:
        raise ConfigError(f"{folder} has no trainings of a study to report. Make them: longspan study --out {folder}")
    begun: dict[str, set[Any]] = {
        "mixers": {cell.group.mixer for cell in cells},
        # The reference has none of these.
        "ratios": {cell.group.ratio for cell in cells} & set(grid.ratios) or set(grid.ratios),
        "tasks": {cell.group.task for cell in cells},
        "seeds": {cell.seed for cell in cells},
    }
    return size, Grid(**{name: tuple(x for x in getattr(grid, name) if x in kept) for name, kept in begun.items()})


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
