"""A run of the trainer beside ``longspan plan train``: peak memory of a rank and time of a step, for several lengths and ranks."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import MEMORY_SETTINGS, Table
from longspan.commands.plan_train import parse, plan
from longspan.launch import num_cores

CELLS = [
    *((1, tokens) for tokens in (4096, 8192, 16384)),
    *((2, tokens) for tokens in (8192, 16384, 32768)),
    *((4, tokens) for tokens in (16384, 32768)),
]
"""Ranks that share a sequence, and its tokens."""
_STEPS = 8
_MEBIBYTE = 2**20


def _options(num_ranks: int, seq_len: int, **more: object) -> list[str]:
    """The main job's model on one sequence a step, which is one document, as it is planned: attention within many takes less."""
    values = {
        "data.documents": "concatenate",
        "data.max_bytes": 2_000_000,
        "parallel.sp": num_ranks,
        "parallel.threads": 1,
        "parallel.exchange": "all_gather",
        "train.steps": _STEPS,
        "train.seq_len": seq_len,
        "train.batch_tokens": seq_len,
        "train.check_tokens": 512,
        "validation.every": 0,
        "validation.sequences": 1,
        "checkpoint.every": 0,
        "sample.tokens": 0,
        "run.measure_alone": False,
    } | more
    return [part for key, value in values.items() for part in (f"--{key}", str(value))]


def _environment() -> dict[str, str]:
    """As a user has it: without the settings that let a timing process keep all memory, but with huge pages, as ranks are given."""
    kept = {name: value for name, value in os.environ.items() if name not in MEMORY_SETTINGS}
    return {**kept, "THP_MEM_ALLOC_ENABLE": "1", "OMP_NUM_THREADS": "1"}


def _run(command: list[str]) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *command], env=_environment(), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:3])} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


@dataclass(frozen=True)
class Cell:
    """A run, and its plan: bytes of the largest peak of a step, and seconds of a step."""

    num_bytes: int
    seconds: float
    planned_bytes: int
    planned_seconds: float

    @property
    def memory(self) -> list[str]:
        return [
            f"{self.num_bytes / _MEBIBYTE:,.0f}",
            f"{self.planned_bytes / _MEBIBYTE:,.0f}",
            f"{self.planned_bytes / self.num_bytes:.2f}",
        ]

    @property
    def time(self) -> list[str]:
        return [
            f"{self.seconds:.2f}",
            f"{self.planned_seconds:.2f}",
            f"{self.planned_seconds / self.seconds:.2f}",
        ]


def _cell(folder: Path, num_ranks: int, options: list[str]) -> Cell:
    run = Path(tempfile.mkdtemp(dir=folder)) / "run"
    _run(["longspan", "train", *options, "--data.folder", f"{folder}/data", "--run.dir", str(run)])
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    planned_bytes, planned_seconds = json.loads(_run(["benchmarks.training", *options]))
    return Cell(
        num_bytes=max(record["peak_memory_bytes"] for record in steps),
        seconds=statistics.median(record["seconds"] for record in steps[2:]),
        planned_bytes=planned_bytes,
        # Ranks that share cores take the time of all that run there.
        planned_seconds=planned_seconds * max(1.0, num_ranks / num_cores()),
    )


_MEMORY = ["MiB", "MiB, planned", "planned / measured"]
_TIME = ["s", "s, planned", "planned / measured"]


def training(quick: bool) -> Table:
    table = Table(
        "training",
        "The main job's model, one sequence a step, ranks of one thread: peak memory of a rank and seconds of a step, and what "
        "`longspan plan train` says of them",
        "planned memory within 10 %, planned time within 20 %",
        ["ranks", "tokens", *_MEMORY, *_TIME],
    )
    with tempfile.TemporaryDirectory() as folder:
        for num_ranks, seq_len in CELLS[:1] if quick else CELLS:
            cell = _cell(Path(folder), num_ranks, _options(num_ranks, seq_len))
            table.add(num_ranks, f"{seq_len:,}", *cell.memory, *cell.time)
    return table


def training_smallest(quick: bool) -> Table:
    """Peaks without holes, which come and go over the steps in which freed memory is kept."""
    table = Table(
        "training_smallest",
        "The same runs with `run.release_memory_every 1`: peak memory of a rank, and what `longspan plan train` says of it",
        "planned memory within 10 %; P times the tokens on P ranks in the memory of one within 10 %",
        ["ranks", "tokens", *_MEMORY],
    )
    with tempfile.TemporaryDirectory() as folder:
        # The last takes minutes, and is the only one of four ranks that fills what one does with 16,384 tokens.
        for num_ranks, seq_len in CELLS[:1] if quick else [*CELLS, (4, 65536)]:
            options = _options(num_ranks, seq_len, **{"run.release_memory_every": 1})
            table.add(num_ranks, f"{seq_len:,}", *_cell(Path(folder), num_ranks, options).memory)
    return table


TABLES: dict[str, Callable[[bool], Table]] = {"training": training, "training_smallest": training_smallest}


if __name__ == "__main__":
    memory, timing = plan(parse(sys.argv[1:]))
    print(json.dumps([memory.total, timing.total]))
