"""The main job as a command, and with a fault at a named instant: what the tests of faults share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Ten times what a slow and busy machine takes.
TIMEOUT = 1200.0


def train(
    *arguments: str | Path, fault: str = "", torchrun: bool = False, restarts: int = 0, cores: int | None = None
) -> subprocess.CompletedProcess[str]:
    """The main job on two ranks, in which `fault` happens, on as many cores as are asked for."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", f"--max-restarts={restarts}"]
    command = [sys.executable, *(launcher if torchrun else []), "-m", "longspan", "train", *map(str, arguments)]
    environment = os.environ | {"LONGSPAN_FAULT": fault, "OMP_NUM_THREADS": "1"}
    if cores is not None:
        available = sorted(os.sched_getaffinity(0))
        if len(available) < cores:
            pytest.skip(f"needs {cores} cores")
        command = ["taskset", "-c", ",".join(map(str, available[:cores])), *command]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, env=environment, check=False)


def has_made_steps(run: Path) -> bool:
    """Whether the run has written what it computed of a step."""
    return (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size > 0
