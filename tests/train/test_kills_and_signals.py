"""Kills and signals at any instant: F3, F10 and F11 of docs/reliability.md, as far as no other test has them."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from longspan.train.checkpoint import complete_checkpoints, newest_checkpoint
from tests.train.faults import TIMEOUT, has_made_steps, train
from tests.train.tiny import COMPUTED, metrics, newest_tensors

# F3


def assert_goes_on_as_if_nothing_had_been(run: Path, uninterrupted: Path) -> None:
    """`--resume` ends as the run that nothing has interrupted, and nothing half-written is left."""
    done = train("--resume", run)
    assert done.returncode == 0, done.stderr
    assert metrics(run, *COMPUTED) == metrics(uninterrupted, *COMPUTED)
    expected = newest_tensors(uninterrupted)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in newest_tensors(run).items())
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-00000006", "step-00000009"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("point", "newest"),
    [
        ("checkpoint.begun:rank=0", 3),
        ("checkpoint.file:rank=0:count=2", 3),
        ("checkpoint.written:rank=0", 3),
        ("checkpoint.renamed:rank=0", 6),
        # All ranks at once.
        ("save", 3),
    ],
)
def test_a_kill_at_any_instant_of_a_save_leaves_a_complete_newest_checkpoint(
    config: Path, uninterrupted: Path, tmp_path: Path, point: str, newest: int
) -> None:
    run = tmp_path / "run"
    done = train("--config", config, "--run.dir", run, fault=f"{point}:step=6:kill")
    assert done.returncode == 1
    assert "was killed by SIGKILL" in done.stderr
    assert newest_checkpoint(run / "checkpoints").name == f"step-{newest:08d}"
    assert_goes_on_as_if_nothing_had_been(run, uninterrupted)


@pytest.mark.slow
def test_a_kill_while_an_old_checkpoint_is_removed_leaves_the_newest(
    config: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    done = train("--config", config, "--run.dir", run, fault="checkpoint.removing:rank=0:step=9:kill")
    assert done.returncode == 1
    assert [path.name for path in complete_checkpoints(run / "checkpoints")] == ["step-00000006", "step-00000009"]
    assert_goes_on_as_if_nothing_had_been(run, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_kills_at_random_instants_lose_no_checkpoint(
    config: Path, uninterrupted: Path, tmp_path: Path, seed: int
) -> None:
    run, numbers = tmp_path / "run", random.Random(seed)
    arguments = [sys.executable, "-m", "longspan", "train", "--config", str(config), "--run.dir", str(run)]
    best = -1
    for _ in range(3):
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with subprocess.Popen(
            [*arguments, "--run.go_on", "True"], stdout=subprocess.PIPE, text=True, env=environment
        ) as process:
            assert process.stdout is not None
            # The checks before the first step take most of a second, nine steps and three saves a few tenths.
            while process.poll() is None and not process.stdout.readline().startswith("check"):
                pass
            time.sleep(numbers.uniform(0.0, 0.6))
            process.kill()
        complete = complete_checkpoints(run / "checkpoints")
        newest = int(complete[-1].name.split("-")[1]) if complete else 0
        assert newest >= best
        best = newest
        # The ranks see their pipe close.
        time.sleep(1.0)
    done = train("--config", config, "--run.dir", run, "--run.go_on", "True")
    assert done.returncode == 0, done.stderr
    assert metrics(run, *COMPUTED) == metrics(uninterrupted, *COMPUTED)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-00000006", "step-00000009"}


# F10


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_restarts_after_a_kill_and_ends_as_if_nothing_had_been(
    config: Path, uninterrupted: Path, tmp_path: Path, rank: int
) -> None:
    run = tmp_path / "run"
    arguments = ("--config", config, "--run.dir", run, "--run.go_on", "True")
    done = train(*arguments, fault=f"forward:rank={rank}:step=8:attempt=0:kill", torchrun=True, restarts=1)
    assert done.returncode == 0, done.stderr
    # Files of the checkpoint of step 6 are written while step 7 is made.
    assert re.search("going on from step [36]$", done.stdout, re.MULTILINE)
    assert metrics(run, *COMPUTED) == metrics(uninterrupted, *COMPUTED)


# F11


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_torchrun_ends_in_a_checkpoint(config: Path, tmp_path: Path, number: signal.Signals) -> None:
    run = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "longspan",
        "train",
    ]
    arguments = ["--config", str(config), "--run.dir", str(run), "--train.steps", "100000", "--checkpoint.every", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*command, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment
    ) as process:
        while process.poll() is None and not has_made_steps(run):
            time.sleep(0.1)
        process.send_signal(number)
        process.communicate(timeout=TIMEOUT)
    last = metrics(run)[-1]["step"]
    assert [path.name for path in complete_checkpoints(run / "checkpoints")] == [f"step-{last:08d}"]
