"""Trainer on ranks that share sequences logs, evaluates and learns what it does in one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.compare import worst_of
from tests.integrations.transformers.training import Run, Trained, train
from tests.ranks import run_on_ranks

TOLERANCE = 1e-10
TIMEOUT = 240.0

RUNS: dict[str, Run] = {
    "an odd number of rows": Run(num_rows=13),
    "packed": Run("bamba", packed=True),
    "accumulated": Run("bamba", num_rows=13, arguments={"gradient_accumulation_steps": 2}),
    "balance loss": Run("qwen3_next", config={"output_router_logits": True, "router_aux_loss_coef": 0.1}),
    "logged rarely": Run("bamba", arguments={"logging_steps": 4}),
    "adapters": Run("minimax", lora=True),
    "adapters, packed": Run("olmo_hybrid", lora=True, packed=True),
    "layers that take no keywords": Run("jamba"),
    "verified before": Run("bamba", prepare={"verify": True}),
    "packed, verified before": Run("qwen3_next", packed=True, prepare={"verify": True, "verify_tokens": 30}),
    "a data set without length": Run("bamba", streamed=True),
    "Adam": Run("qwen3_next", arguments={"optim": "adamw_torch", "learning_rate": 1e-3}),
}


def run_in_one_process(run: Run, folder: Path) -> Trained:
    return train(run, str(folder / "alone"), 0)


def run_over_ranks(run: Run, folder: Path, cp_size: int = 2, replicas: int = 1, **options: Any) -> list[Trained]:
    arguments = (run, str(folder / "ranks"), cp_size, options.get("resume"), options.get("steps", 6))
    return run_on_ranks(cp_size * replicas, train, *arguments, timeout=TIMEOUT, checked=False)


def check(found: list[Trained], want: Trained, tolerance: float = TOLERANCE) -> None:
    for rank, trained in enumerate(found):
        error, what = worst_of(trained.errors(want))
        assert error < tolerance, f"rank {rank}: {what} is off by {error:.1e}"


def test_two_ranks_train_as_one_process(tmp_path: Path) -> None:
    run = RUNS["an odd number of rows"]
    check(run_over_ranks(run, tmp_path), run_in_one_process(run, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RUNS if name != "an odd number of rows"])
def test_two_ranks_train_as_one_process_whatever_the_recipe(tmp_path: Path, name: str) -> None:
    check(run_over_ranks(RUNS[name], tmp_path), run_in_one_process(RUNS[name], tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["an odd number of rows", "balance loss"])
def test_replicas_of_shared_sequences_train_as_replicas(tmp_path: Path, name: str) -> None:
    run = RUNS[name]
    want = run_on_ranks(2, train, run, str(tmp_path / "replicas"), 0, timeout=TIMEOUT, checked=False)
    check(run_over_ranks(run, tmp_path, replicas=2), want[0])


@pytest.mark.slow
def test_metrics_of_whole_sequences(tmp_path: Path) -> None:
    run = Run("bamba", num_rows=13, metrics=True)
    over_ranks = replace(run, prepare={"gather_logits": True})
    check(run_over_ranks(over_ranks, tmp_path), run_in_one_process(run, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["jamba", "kimi_linear", "qwen3_next"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_gradients_change_nothing(tmp_path: Path, family: str, reentrant: bool) -> None:
    # Recomputation runs outside of the mode that widens float32: so in float32, where nothing must change at all.
    plain = Run(family, wide=False, dtype=torch.float32)
    arguments = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": reentrant}}
    without = run_over_ranks(plain, tmp_path)
    for rank, found in enumerate(run_over_ranks(replace(plain, arguments=arguments), tmp_path)):
        assert found.log == without[rank].log
        assert all(torch.equal(found.weights[name], weight) for name, weight in without[rank].weights.items())


@pytest.mark.slow
def test_bfloat16_of_trainer_runs_and_stays_near(tmp_path: Path) -> None:
    exact = run_in_one_process(Run("bamba"), tmp_path)
    mixed = Run("bamba", wide=False, dtype=torch.float32, arguments={"bf16": True})
    alone = run_in_one_process(mixed, tmp_path)
    ranks = run_over_ranks(mixed, tmp_path)
    of_one = _difference(alone, exact)
    for trained in ranks:
        assert 0 < _difference(trained, exact) < 2 * of_one


def _difference(found: Trained, exact: Trained) -> float:
    return sum(abs(a - b) for a, b in zip(found.log["loss"], exact.log["loss"], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("saved_by", ["one process", "two ranks"])
def test_a_checkpoint_goes_on_with_another_number_of_ranks(tmp_path: Path, saved_by: str) -> None:
    run = Run("bamba", num_rows=13)
    want = run_in_one_process(run, tmp_path)
    saving = replace(run, arguments={"save_strategy": "steps", "save_steps": 3})
    if saved_by == "one process":
        train(saving, str(tmp_path / "saved"), 0, None, 3)
        checkpoint = tmp_path / "saved" / "checkpoint-3"
    else:
        run_over_ranks(saving, tmp_path, steps=3)
        checkpoint = tmp_path / "ranks" / "checkpoint-3"
        assert len(list(checkpoint.glob("*.safetensors"))) == 1
    alone = train(run, str(tmp_path / "on"), 0, str(checkpoint))
    check(run_over_ranks(run, tmp_path, resume=str(checkpoint)), alone)
    # Trainer's mean over a training is of the steps since it went on.
    check([_without_mean(alone)], _without_mean(want))


def _without_mean(trained: Trained) -> Trained:
    return replace(trained, log={name: values for name, values in trained.log.items() if name != "train_loss"})
