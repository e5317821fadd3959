"""Faults, each at its instant: F1 to F17 of docs/reliability.md, as far as no other test has them."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

import longspan
from longspan.data.packing import Sequences
from longspan.errors import ConfigError, LongspanError
from longspan.faults import Fault, parse_faults
from longspan.launch import EXIT_DONE, Place
from longspan.layout import SequenceLayout
from longspan.models import LinearLlama3
from longspan.parallel import MeshDegrees
from longspan.parallel.sharded import on_this_rank
from longspan.train.checkpoint import complete_checkpoints, newest_checkpoint
from longspan.train.config import Config, read_toml, to_toml
from longspan.train.loss import evaluate, loss_sum
from longspan.train.model import sum_over_ranks
from longspan.train.optimizer import learning_rate
from longspan.train.phase import RunPhase
from longspan.train.ranks import Ranks
from longspan.train.trainer import Trainer
from longspan.train.watch import FolderBoard, Watch
from tests.compare import relative_error
from tests.models.tiny import tiny_model
from tests.ranks import raised, run_on_ranks
from tests.shared import made_once
from tests.train.tiny import COMPUTED, metrics, newest_tensors, tiny_config, train_here, write_corpus

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


# F2


def _losses_and_gradients(valid: tuple[int, ...]) -> list[torch.Tensor]:
    """Loss, validation loss and gradients where `valid` are the only places of a row of 16 tokens that have a label."""
    tokens = torch.randint(257, (1, 17), generator=torch.Generator().manual_seed(0))
    # A document starts behind each place that has none.
    sequences = Sequences(tokens, (tuple(place + 1 for place in range(16) if place not in valid),))
    ranks = Ranks(Place(dist.get_rank(), dist.get_world_size()), torch.device("cpu"))
    ranks.arrange(MeshDegrees(sp=dist.get_world_size()))

    def layout_of(seq_len: int, documents: Any = None) -> SequenceLayout:
        return SequenceLayout(seq_len, documents=documents)

    model: LinearLlama3 = longspan.parallelize(tiny_model(vocab_size=257, pattern="LN", num_layers=2), None)
    batch = sequences.packed()
    assert batch.num_valid_tokens == len(valid)
    loss = loss_sum(model, batch, layout_of(16, batch.documents)) / len(valid)
    loss.backward()
    longspan.sum_gradients(model)
    total = loss.detach().clone()
    dist.all_reduce(total)
    evaluation = evaluate(model, sequences, np.ones(257), layout_of, ranks)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [total, torch.tensor(evaluation.nats_per_token, dtype=torch.float64), *gradients]


@pytest.mark.parametrize("valid", [(0, 1, 2, 3, 12, 13), (5, 6), (15,)], ids=["one without", "one with", "one token"])
def test_ranks_without_a_single_label_change_nothing(valid: tuple[int, ...]) -> None:
    (alone,) = run_on_ranks(1, _losses_and_gradients, valid)
    assert all(x.isfinite().all() for x in alone)
    for got in run_on_ranks(4, _losses_and_gradients, valid):
        assert all(relative_error(x, y) < 1e-10 for x, y in zip(got, alone, strict=True))


# F3


@pytest.fixture(scope="session")
def finished(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on two ranks that nothing has interrupted."""

    def make(folder: Path) -> str:
        done = train("--config", config, "--run.dir", folder / "run")
        assert done.returncode == 0, done.stderr
        return str(folder / "run")

    return Path(made_once(tmp_path_factory, "faults-finished", make))


def assert_goes_on_as_if_nothing_had_been(run: Path, finished: Path) -> None:
    """`--resume` ends as the run that nothing has interrupted, and nothing half-written is left."""
    done = train("--resume", run)
    assert done.returncode == 0, done.stderr
    assert metrics(run, *COMPUTED) == metrics(finished, *COMPUTED)
    expected = newest_tensors(finished)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in newest_tensors(run).items())
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-00000006", "step-00000009"}


@pytest.mark.parametrize(
    ("point", "newest"),
    [
        pytest.param("checkpoint.begun:rank=0", 3, marks=pytest.mark.slow),
        pytest.param("checkpoint.file:rank=0:count=2", 3, marks=pytest.mark.slow),
        ("checkpoint.written:rank=0", 3),
        pytest.param("checkpoint.renamed:rank=0", 6, marks=pytest.mark.slow),
        # All ranks at once.
        pytest.param("save", 3, marks=pytest.mark.slow),
    ],
)
def test_a_kill_at_any_instant_of_a_save_leaves_a_complete_newest_checkpoint(
    config: Path, finished: Path, tmp_path: Path, point: str, newest: int
) -> None:
    run = tmp_path / "run"
    done = train("--config", config, "--run.dir", run, fault=f"{point}:step=6:kill")
    assert done.returncode == 1
    assert "was killed by SIGKILL" in done.stderr
    assert newest_checkpoint(run / "checkpoints").name == f"step-{newest:08d}"
    assert_goes_on_as_if_nothing_had_been(run, finished)


@pytest.mark.slow
def test_a_kill_while_an_old_checkpoint_is_removed_leaves_the_newest(
    config: Path, finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    done = train("--config", config, "--run.dir", run, fault="checkpoint.removing:rank=0:step=9:kill")
    assert done.returncode == 1
    assert [path.name for path in complete_checkpoints(run / "checkpoints")] == ["step-00000006", "step-00000009"]
    assert_goes_on_as_if_nothing_had_been(run, finished)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_kills_at_random_instants_lose_no_checkpoint(config: Path, finished: Path, tmp_path: Path, seed: int) -> None:
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
    assert metrics(run, *COMPUTED) == metrics(finished, *COMPUTED)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-00000006", "step-00000009"}


# F7


@pytest.mark.slow
def test_a_run_goes_on_over_other_meshes_with_the_same_samples(corpus: Path, tmp_path: Path) -> None:
    values = {"train__batch_tokens": 488, "checkpoint__every": 2, "validation__every": 0}
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    config = tiny_config(corpus, whole, train__steps=8, parallel__sp=1, **values)
    assert run_on_ranks(1, train_here, config) == [EXIT_DONE]
    for part, (dp, sp) in enumerate([(2, 2), (1, 4), (4, 1), (1, 1)]):
        mesh = {"parallel__dp_replicate": dp, "parallel__sp": sp, "train__steps": 2 * part + 2}
        # The whole run's schedule of learning rates, and not that of the first two steps.
        part_config = tiny_config(corpus, moved, **mesh, **values)
        found = run_on_ranks(dp * sp, _with_learning_rates_of, 8, part_config, part > 0)
        assert found == [EXIT_DONE] * (dp * sp)
    keys = ("step", "loss", "valid_tokens", "lr")
    ours, theirs = ([r for r in metrics(run, *keys) if "loss" in r] for run in (moved, whole))
    assert [r["step"] for r in ours] == list(range(1, 9))
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, rel=1e-6)


def _with_learning_rates_of(steps: int, config: Config, resume: bool) -> int:
    with mock.patch("longspan.train.trainer.learning_rate", lambda optim, step, _: learning_rate(optim, step, steps)):
        return train_here(config, resume)


# F8


def _nan_after_the_sum_on_rank_1(config: Config, bad_steps: tuple[int, ...]) -> int:
    calls = 0

    def sabotaged(model: torch.nn.Module, ranks: Ranks) -> None:
        nonlocal calls
        calls += 1
        sum_over_ranks(model, ranks)
        if dist.get_rank() == 1 and calls in bad_steps:
            next(iter(model.parameters())).grad.view(-1)[0] = float("nan")  # type: ignore[union-attr]

    with mock.patch("longspan.train.trainer.sum_over_ranks", sabotaged):
        return train_here(config)


def test_a_nan_that_one_rank_alone_sees_makes_all_skip(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    values = {"train__check_replicas_every": 1, "checkpoint__every": 1, "checkpoint__keep": 9, "train__steps": 4}
    config = tiny_config(corpus, run, **values)
    assert run_on_ranks(2, _nan_after_the_sum_on_rank_1, config, (3,)) == [EXIT_DONE] * 2
    assert [record["skipped"] for record in metrics(run) if "loss" in record] == [False, False, True, False]


# F9


def test_a_rank_that_fails_says_where_the_others_are_and_which_are_silent(tmp_path: Path) -> None:
    phases = [RunPhase() for _ in range(3)]
    watches = [Watch(Place(rank, 3, rank, 3, tmp_path), phases[rank], 60.0) for rank in range(3)]
    phases[1].step, phases[1].name = 7, "reading a batch"
    # Rank 2 was there once, and was stopped.
    watches[2].meet("run")
    watches[2]._publish(FolderBoard(tmp_path))
    with watches[1].watching():
        watches[1].meet("run")
        with pytest.raises(TimeoutError) as raised, watches[0].watching():
            watches[0].meet("run")
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


# F10


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_restarts_after_a_kill_and_ends_as_if_nothing_had_been(
    config: Path, finished: Path, tmp_path: Path, rank: int
) -> None:
    run = tmp_path / "run"
    arguments = ("--config", config, "--run.dir", run, "--run.go_on", "True")
    done = train(*arguments, fault=f"forward:rank={rank}:step=8:attempt=0:kill", torchrun=True, restarts=1)
    assert done.returncode == 0, done.stderr
    # Files of the checkpoint of step 6 are written while step 7 is made.
    assert re.search("going on from step [36]$", done.stdout, re.MULTILINE)
    assert metrics(run, *COMPUTED) == metrics(finished, *COMPUTED)


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
        while process.poll() is None and not (run / "metrics.jsonl").exists():
            time.sleep(0.1)
        process.send_signal(number)
        process.communicate(timeout=TIMEOUT)
    last = metrics(run)[-1]["step"]
    assert [path.name for path in complete_checkpoints(run / "checkpoints")] == [f"step-{last:08d}"]


# F12


class _Canary:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_no_file_that_is_read_is_ever_unpickled(corpus: Path, tmp_path: Path) -> None:
    original, canary = tmp_path / "original", tmp_path / "canary"
    assert run_on_ranks(1, train_here, tiny_config(corpus, original, parallel__sp=1)) == [EXIT_DONE]
    newest = newest_checkpoint(original / "checkpoints")
    files = [*newest.rglob("*"), *(original / "data").rglob("*"), original / "metrics.jsonl", original / "config.toml"]
    pickled = pickle.dumps(_Canary(canary))
    archive = io.BytesIO()
    torch.save(_Canary(canary), archive)
    for path in [path for path in files if path.is_file()]:
        for content in (pickled, archive.getvalue()):
            run = tmp_path / "run"
            shutil.copytree(original, run)
            (run / path.relative_to(original)).write_bytes(content)
            if path.name == "config.toml":
                with pytest.raises(ConfigError, match=r"config.toml cannot be read as a config"):
                    read_toml(run / path.name)
            else:
                outcome = run_on_ranks(1, _resumed_or_refused, tiny_config(corpus, run, parallel__sp=1))[0]
                # A recipe is written anew where it is no recipe.
                assert path.name in outcome or outcome == "done", path
            assert not canary.exists(), path
            shutil.rmtree(run)
    # Names that other libraries unpickle, beside what is read.
    for name in (".metadata", "model.pt", "optimizer.pt", "rng_state.pth", "training_args.bin", "pytorch_model.bin"):
        (newest / name).write_bytes(pickled)
        (original / name).write_bytes(pickled)
    assert run_on_ranks(1, _resumed_or_refused, tiny_config(corpus, original, parallel__sp=1))[0] == "done"
    assert not canary.exists()
    pickle.loads(pickled)
    assert canary.exists()


def _resumed_or_refused(config: Config) -> str:
    try:
        return {EXIT_DONE: "done"}[train_here(config, True)]
    except LongspanError as error:
        return str(error)


def test_links_lead_to_nothing_that_is_removed_or_written(corpus: Path, tmp_path: Path) -> None:
    run, outside = tmp_path / "run", tmp_path / "outside"
    config = tiny_config(corpus, run, parallel__sp=1, train__steps=3)
    assert run_on_ranks(1, train_here, config) == [EXIT_DONE]
    outside.mkdir()
    (outside / "thesis.tex").touch()
    for name in (".writing-step-00000004", ".removing-step-00000001", "step-00000002"):
        (run / "checkpoints" / name).symlink_to(outside)
    longer = tiny_config(corpus, run, parallel__sp=1, train__steps=4, checkpoint__keep=1)
    run_on_ranks(1, _resumed_or_refused, longer)
    assert [path.name for path in outside.iterdir()] == ["thesis.tex"]


# F13


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", path], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"mounting a disk of its own needs root: {mounted.stderr.decode().strip()}")
    yield path
    subprocess.run(["umount", "-l", path], check=True)


def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint(corpus: Path, small_disk: Path) -> None:
    run = small_disk / "run"
    values: dict[str, Any] = {
        "train__steps": 100,
        "checkpoint__every": 1,
        "checkpoint__keep": 100,
        "validation__every": 0,
    }
    values["parallel__sp"] = 1
    ((kind, text),) = run_on_ranks(1, raised, train_here, tiny_config(corpus, run, **values))
    assert kind in ("CheckpointError", "ConfigError")
    assert "could not be written" in text and "No space left on device" in text
    complete = complete_checkpoints(run / "checkpoints")
    assert len(complete) >= 2
    last = int(complete[-1].name.split("-")[1])
    for old in complete[:-1]:
        shutil.rmtree(old)
    go_on = tiny_config(corpus, run, **values | {"train__steps": last + 1, "checkpoint__keep": 1})
    assert run_on_ranks(1, train_here, go_on, True) == [EXIT_DONE]


def test_a_folder_that_cannot_be_written_is_refused_or_leaves_the_last_checkpoint(
    corpus: Path, tmp_path: Path, small_disk: Path
) -> None:
    run = small_disk / "run"
    config = tiny_config(corpus, run, parallel__sp=1, train__steps=3)
    assert run_on_ranks(1, train_here, config) == [EXIT_DONE]
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    (outcome,) = run_on_ranks(1, _resumed_or_refused, tiny_config(corpus, run, parallel__sp=1, train__steps=4))
    assert "could not be written" in outcome and "Read-only file system" in outcome
    (outcome,) = run_on_ranks(1, _refused, tiny_config(corpus, small_disk / "new", parallel__sp=1))
    assert "cannot be made" in outcome and "Read-only file system" in outcome
    assert newest_checkpoint(run / "checkpoints").name == "step-00000003"


def _refused(config: Config) -> str:
    return raised(train_here, config)[1]


def _folder_removed_before_step_2(config: Config) -> tuple[str, str]:
    begun = Trainer._train_step

    def step(trainer: Trainer, *arguments: Any) -> bool:
        if trainer.step == 1:
            shutil.rmtree(trainer.folder.path)
        return begun(trainer, *arguments)

    with mock.patch.object(Trainer, "_train_step", step):
        return raised(train_here, config)


def test_a_run_whose_folder_is_removed_ends_and_says_so(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ((kind, text),) = run_on_ranks(1, _folder_removed_before_step_2, tiny_config(corpus, run, parallel__sp=1))
    assert kind in ("CheckpointError", "ConfigError")
    assert f"{run}" in text and "No such file or directory" in text
    assert not run.exists()


# F14


def _started_differently(config: Config) -> int:
    if dist.get_rank() == 1:
        model = dataclasses.replace(config.model, dim=32)
        train = dataclasses.replace(config.train, seed=7, seq_len=30, batch_tokens=300, dtype="bfloat16")
        config = dataclasses.replace(config, model=model, train=train)
    return train_here(config)


def test_ranks_with_another_config_seed_length_and_dtype_all_end_with_one_table(corpus: Path, tmp_path: Path) -> None:
    found = run_on_ranks(3, raised, _started_differently, tiny_config(corpus, tmp_path / "run"))
    assert len(set(found)) == 1
    kind, text = found[0]
    assert kind == "ConfigError"
    for line in (
        "model.dim: rank 0 '16', rank 1 '32', rank 2 '16'",
        "train.dtype: rank 0 \"'float32'\", rank 1 \"'bfloat16'\", rank 2 \"'float32'\"",
        "train.seed: rank 0 '0', rank 1 '7', rank 2 '0'",
        "train.seq_len: rank 0 '61', rank 1 '30', rank 2 '61'",
    ):
        assert line in text
    assert not (tmp_path / "run").exists()


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
    state = newest_checkpoint(tmp_path / "once" / "checkpoints") / "state.json"
    assert json.loads(state.read_text())["exchange"] is None
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
