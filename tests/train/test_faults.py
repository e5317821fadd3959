"""Faults, each at its instant: F1 to F17 of docs/reliability.md, as far as no other test has them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from longspan.errors import ConfigError
from longspan.faults import Fault, parse_faults
from longspan.launch import Place
from longspan.train.config import to_toml
from longspan.train.phase import RunPhase
from longspan.train.watch import FolderBoard, Watch
from tests.shared import made_once
from tests.train.tiny import tiny_config, write_corpus

# Ten times what a slow and busy machine takes.
TIMEOUT = 1200.0


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TOML file of a tiny run of 9 steps with a checkpoint at each third, without its folder."""

    def write(folder: Path) -> str:
        changes = {"train__steps": 9, "sample__tokens": 0, "parallel__exchange": "all_gather"}
        text = to_toml(tiny_config(write_corpus(folder / "text"), Path("unused"), **changes))
        path = folder / "tiny.toml"
        path.write_text("\n".join(line for line in text.split("\n") if not line.startswith("dir =")))
        return str(path)

    return Path(made_once(tmp_path_factory, "faults-config", write))


def train(
    *arguments: str | Path, fault: str = "", torchrun: bool = False, restarts: int = 0
) -> subprocess.CompletedProcess[str]:
    """The main job on two ranks, in which `fault` happens."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", f"--max-restarts={restarts}"]
    command = [sys.executable, *(launcher if torchrun else []), "-m", "longspan", "train", *map(str, arguments)]
    environment = os.environ | {"LONGSPAN_FAULT": fault, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, env=environment, check=False)


def test_a_fault_is_a_point_conditions_and_an_action() -> None:
    assert parse_faults("checkpoint.written:rank=0:step=5:kill; forward:sleep=1.5") == (
        Fault("checkpoint.written", "kill", rank=0, step=5),
        Fault("forward", "sleep", seconds=1.5),
    )
    assert parse_faults("") == ()
    for text in (
        "forward",
        "forward:die",
        "forward:sleep",
        "forward:kill=1",
        "forward:rank=x:kill",
        "forward:at=1:kill",
    ):
        with pytest.raises(ConfigError, match=r"LONGSPAN_FAULT has 'forward.*unset it to run without faults"):
            parse_faults(text)


# F9


def test_a_rank_that_fails_says_where_the_others_are_and_which_are_silent(tmp_path: Path) -> None:
    phases = [RunPhase() for _ in range(3)]
    watches = [Watch(Place(rank, 3, rank, 3, tmp_path), phases[rank], 60.0) for rank in range(3)]
    phases[1].step, phases[1].name = 7, "reading a batch"
    # Rank 2 was there once, and was stopped.
    watches[2].meet()
    watches[2]._publish(FolderBoard(tmp_path))
    with watches[1].watching():
        watches[1].meet()
        with pytest.raises(TimeoutError) as raised, watches[0].watching():
            watches[0].meet()
            raise TimeoutError("too long")
    silent, alive = raised.value.__notes__
    assert silent == "rank 2 does not answer; last heard of: while starting"
    assert re.fullmatch(r"rank 1: step 7, while reading a batch, for \d s", alive)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "torchrun", "message"),
    [
        (
            "forward:rank=1:step=4:stop",
            False,
            "rank 0 of 2, step 4, while computing forward; rank 1 does not answer; last heard of: ",
        ),
        ("forward:rank=0:step=4:sleep=1000", True, "rank 0: step 4, while computing forward, for"),
        ("batch:rank=1:step=6:sleep=1000", False, "the batch of step 6 of rank 1 was not there after 5.4 s of reading"),
        ("batch:rank=1:step=6:sleep=1000", True, "the batch of step 6 of rank 1 was not there after 5.4 s of reading"),
        ("checkpoint.file:rank=0:step=3:sleep=1000", False, "rank 0: step 3, while saving a checkpoint, for"),
        (
            "save:rank=0:step=3:stop",
            True,
            "rank 1 of 2, step 3, while saving a checkpoint; rank 0 does not answer; last heard of: ",
        ),
    ],
)
def test_a_rank_that_sleeps_or_is_stopped_ends_the_run_and_is_named(
    config: Path, tmp_path: Path, fault: str, torchrun: bool, message: str
) -> None:
    arguments = ("--config", config, "--run.dir", tmp_path / "run", "--parallel.timeout_seconds", "6")
    done = train(*arguments, fault=fault, torchrun=torchrun)
    ended = time.time()
    assert done.returncode == (2 if "batch" in fault and not torchrun else 1)
    assert message in done.stderr
    if "batch" not in fault:
        assert "(most recent call first)" in done.stderr
    begun = float(re.findall(r"longspan: fault: .* time ([0-9.]+)", done.stderr)[0])
    if os.getloadavg()[0] < 2 * (os.cpu_count() or 1):
        assert ended - begun < 6 + 10


@pytest.mark.slow
def test_one_process_whose_disk_does_not_answer_ends_with_its_stacks(config: Path, tmp_path: Path) -> None:
    fault = "checkpoint.written:step=3:sleep=1000"
    arguments = ("--config", config, "--run.dir", tmp_path / "run", "--parallel.timeout_seconds", "3")
    done = train(*arguments, "--parallel.sp", "1", fault=fault)
    assert done.returncode == 1
    assert (
        "takes longer than 3 s, parallel.timeout_seconds: rank 0 of 1, step 3, while saving a checkpoint" in done.stderr
    )
    assert "in save_checkpoint" in done.stderr
