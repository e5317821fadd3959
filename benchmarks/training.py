"""A run of the trainer beside ``longspan plan train``: peak memory of a rank and time of a step, for several lengths and ranks."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
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


def _options(num_ranks: int, seq_len: int) -> list[str]:
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
        # Peaks without holes, which come and go over the steps in between.
        "run.release_memory_every": 1,
    }
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


def training(quick: bool) -> Table:
    table = Table(
        "training",
        "The main job's model, one sequence a step, ranks of one thread: peak memory of a rank and seconds of a step, and what "
        "`longspan plan train` says of them",
        "planned memory within 10 %, planned time within 20 %; P times the tokens on P ranks in the memory of one within 10 %",
        ["ranks", "tokens", "MiB", "MiB, planned", "planned / measured", "s", "s, planned", "planned / measured"],
    )
    with tempfile.TemporaryDirectory() as folder:
        for num_ranks, seq_len in CELLS[:1] if quick else CELLS:
            options = _options(num_ranks, seq_len)
            run = Path(folder) / f"{num_ranks}-{seq_len}"
            _run(["longspan", "train", *options, "--data.folder", f"{folder}/data", "--run.dir", str(run)])
            records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            steps = [record for record in records if "loss" in record]
            peak = max(record["peak_memory_bytes"] for record in steps)
            seconds = statistics.median(record["seconds"] for record in steps[2:])
            planned_bytes, planned_seconds = json.loads(_run(["benchmarks.training", *options]))
            # Ranks that share cores take the time of all that run there.
            planned_seconds *= max(1.0, num_ranks / num_cores())
            table.add(
                num_ranks,
                f"{seq_len:,}",
                f"{peak / _MEBIBYTE:,.0f}",
                f"{planned_bytes / _MEBIBYTE:,.0f}",
                f"{planned_bytes / peak:.2f}",
                f"{seconds:.2f}",
                f"{planned_seconds:.2f}",
                f"{planned_seconds / seconds:.2f}",
            )
    return table


TABLES: dict[str, Callable[[bool], Table]] = {"training": training}


if __name__ == "__main__":
    memory, timing = plan(parse(sys.argv[1:]))
    print(json.dumps([memory.total, timing.total]))
