"""Faults, each at its instant: F1 to F17 of docs/reliability.md, as far as no other test has them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from longspan.errors import ConfigError
from longspan.faults import Fault, parse_faults
from longspan.launch import EXIT_DONE, Place
from longspan.parallel.sharded import on_this_rank
from longspan.train.checkpoint import newest_checkpoint
from longspan.train.config import Config, to_toml
from longspan.train.phase import RunPhase
from longspan.train.trainer import Trainer
from longspan.train.watch import FolderBoard, Watch
from tests.ranks import raised, run_on_ranks
from tests.shared import made_once
from tests.train.checkpoints import load_checkpoint
from tests.train.tiny import newest_tensors, tiny_config, train_here, write_corpus

# Ten times what a slow and busy machine takes.
TIMEOUT = 1200.0


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(made_once(tmp_path_factory, "faults-corpus", lambda folder: str(write_corpus(folder / "text"))))


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
        (
            "batch:rank=1:step=6:sleep=1000",
            False,
            "the batch of step 6 of rank 1 was not there after 10.8 s of reading",
        ),
        ("batch:rank=1:step=6:sleep=1000", True, "the batch of step 6 of rank 1 was not there after 10.8 s of reading"),
        (
            "checkpoint.file:rank=0:step=3:sleep=1000",
            False,
            "rank 0 has not written its files of the checkpoint of step 3 after 10.8 s",
        ),
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
    arguments = ("--config", config, "--run.dir", tmp_path / "run", "--parallel.timeout_seconds", "12")
    done = train(*arguments, fault=fault, torchrun=torchrun)
    ended = time.time()
    assert done.returncode == (2 if "batch" in fault and not torchrun else 1)
    assert message in done.stderr
    if "batch" not in fault:
        assert "(most recent call first)" in done.stderr
    begun = float(re.findall(r"longspan: fault: .* time ([0-9.]+)", done.stderr)[0])
    if os.getloadavg()[0] < 2 * (os.cpu_count() or 1):
        assert ended - begun < 12 + 10


@pytest.mark.slow
def test_one_process_whose_disk_does_not_answer_ends_with_its_stacks(config: Path, tmp_path: Path) -> None:
    fault = "checkpoint.written:step=3:sleep=1000"
    arguments = ("--config", config, "--run.dir", tmp_path / "run", "--parallel.timeout_seconds", "3")
    done = train(*arguments, "--parallel.sp", "1", "--checkpoint.asynchronous", "False", fault=fault)
    assert done.returncode == 1
    assert (
        "takes longer than 3 s, parallel.timeout_seconds: rank 0 of 1, step 3, while saving a checkpoint" in done.stderr
    )
    assert "in complete_checkpoint" in done.stderr


# F16


@pytest.mark.slow
def test_a_deterministic_run_is_the_same_bits_whatever_the_cores(tmp_path: Path) -> None:
    """On one core and on two, which without the option is one thread a process and two: an exchange is not measured either."""
    values = {"train__deterministic": True, "parallel__exchange": "auto", "parallel__sp": 1, "train__seq_len": 1024}
    sizes = {
        "model__dim": 128,
        "model__hidden_dim": 352,
        "train__batch_tokens": 2048,
        "train__steps": 2,
        "validation__every": 0,
    }
    found = []
    for cores in (1, 2):
        run = tmp_path / str(cores)
        text = to_toml(tiny_config(write_corpus(tmp_path / f"text-{cores}"), run, **values, **sizes))
        (tmp_path / "config.toml").write_text(text)
        found.append(train("--config", tmp_path / "config.toml", cores=cores))
        assert found[-1].returncode == 0, found[-1].stderr
        assert "1 process on cpu, 1 threads" in found[-1].stdout
    one, two = (newest_tensors(tmp_path / str(cores)) for cores in (1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_deterministic_run_twice_is_the_same_bits_and_measures_no_exchange(corpus: Path, tmp_path: Path) -> None:
    values = {"train__deterministic": True, "train__steps": 3}
    for name in ("once", "again"):
        assert run_on_ranks(2, train_here, tiny_config(corpus, tmp_path / name, **values)) == [EXIT_DONE] * 2
    once, again = (newest_tensors(tmp_path / name) for name in ("once", "again"))
    assert all(torch.equal(once[name], again[name]) for name in once)
    assert load_checkpoint(newest_checkpoint(tmp_path / "once" / "checkpoints")).state["exchange"] is None
    with pytest.raises(ConfigError, match=r"train.deterministic is True and parallel.threads 2"):
        tiny_config(corpus, tmp_path, parallel__threads=2, train__deterministic=True)


# Replicas


def _one_weight_changed_on(rank: int, config: Config) -> int:
    before = Trainer.validate

    def validate(trainer: Trainer) -> None:
        if dist.get_rank() == rank and trainer.step == 3:
            weight = on_this_rank(dict(trainer.model.named_parameters())["norm.weight"]).detach()
            weight.view(torch.int32)[0] ^= 1
        before(trainer)

    with mock.patch.object(Trainer, "validate", validate):
        return train_here(config)


@pytest.mark.parametrize(
    ("mesh", "parts"),
    [
        ({"parallel__sp": 2, "parallel__dp_replicate": 2}, "ranks 0+2+3 | 1"),
        ({"parallel__sp": 2, "parallel__dp_shard": 2}, "ranks 0 | 1"),
    ],
)
def test_one_flipped_bit_on_one_rank_is_named_on_all(
    corpus: Path, tmp_path: Path, mesh: dict[str, Any], parts: str
) -> None:
    values = {
        "train__check_replicas_every": 2,
        "checkpoint__every": 1,
        "checkpoint__keep": 9,
        "train__batch_tokens": 488,
    }
    config = tiny_config(corpus, tmp_path / "run", **mesh, **values)
    for kind, text in run_on_ranks(4, raised, _one_weight_changed_on, 1, config):
        assert kind == "ReplicaError"
        assert text.startswith("after step 4 ranks that must hold the same weights do not:\n  ")
        assert f"norm.weight: {parts}" in text
    assert [path.name for path in sorted((tmp_path / "run" / "checkpoints").iterdir())][-1] == "step-00000003"
