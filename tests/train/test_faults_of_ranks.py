"""Faults of ranks: F2, F7 to F9 and F14 of docs/reliability.md, as far as no other test has them."""

from __future__ import annotations

import dataclasses
import os
import re
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

import longspan
from longspan.data.packing import Sequences
from longspan.errors import ConfigError
from longspan.faults import Fault, parse_faults
from longspan.launch import EXIT_DONE, Place
from longspan.layout import SequenceLayout
from longspan.models import LinearLlama3
from longspan.parallel import MeshDegrees
from longspan.parallel.sharded import on_this_rank
from longspan.train.config import Config
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
from tests.train.faults import train
from tests.train.tiny import metrics, tiny_config, train_here


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


@pytest.mark.slow_rows(r"mesh[01]")
@pytest.mark.parametrize(
    ("mesh", "parts"),
    [
        ({"parallel__sp": 2, "parallel__dp_replicate": 2}, "ranks 0+2+3 | 1"),
        ({"parallel__sp": 2, "parallel__dp_shard": 2}, "ranks 0 | 1"),
        ({"parallel__sp": 2}, "ranks 0 | 1"),
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
    for kind, text in run_on_ranks(2 * len(mesh), raised, _one_weight_changed_on, 1, config):
        assert kind == "ReplicaError"
        assert text.startswith("after step 4 ranks that must hold the same weights do not:\n  ")
        assert f"norm.weight: {parts}" in text
    assert [path.name for path in sorted((tmp_path / "run" / "checkpoints").iterdir())][-1] == "step-00000003"
