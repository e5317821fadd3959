"""Runs of models with experts: the same on any ranks, checked before the first step, with the routers in the metrics."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from longspan.data.packing import PackedBatch
from longspan.launch import EXIT_DONE, Place
from longspan.models import LinearLlama3, LinearLlama3Config, Routing
from longspan.train.config import Config
from longspan.train.loss import loss_share, loss_sum
from longspan.train.ranks import Ranks
from longspan.train.routers import router_metrics, shares_of_rank
from longspan.train.trained import open_trained
from longspan.train.verify import verify_config
from tests.compare import worst
from tests.ranks import raised, run_on_ranks
from tests.shared import made_once
from tests.train.tiny import COMPUTED, metrics, newest_tensors, tiny_config, train_here

OF_ROUTERS = ("auxiliary_loss", "balance_loss", "z_loss", "router_entropy", "fullest_expert", "idle_experts")
EXPERTS: dict[str, Any] = {
    "model__num_experts": 4,
    "model__experts_per_token": 2,
    "model__num_shared_experts": 1,
    "model__balance_loss_weight": 0.05,
    "parallel__exchange": "all_gather",
}


@pytest.fixture(scope="session")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of six steps on two ranks that share sequences."""

    def make(folder: Path) -> str:
        assert run_on_ranks(2, train_here, tiny_config(corpus, folder / "run", **EXPERTS)) == [EXIT_DONE] * 2
        return str(folder / "run")

    return Path(made_once(tmp_path_factory, "run-of-experts", make))


def test_metrics_say_what_the_routers_did(finished: Path) -> None:
    steps = [record for record in metrics(finished) if "loss" in record]
    assert len(steps) == 6
    for record in steps:
        assert record["auxiliary_loss"] == pytest.approx(2 * (0.05 * record["balance_loss"] + 0.001 * record["z_loss"]))
        assert 0.9 < record["balance_loss"] < 2.0
        assert 0.0 < record["router_entropy"] <= math.log(4) * (1 + 1e-6)
        assert 1.0 <= record["fullest_expert"] <= 2.0 and 0.0 <= record["idle_experts"] < 1.0
    # Almost uniform at first: the cross-entropy alone is that of guessing among 257.
    assert steps[0]["loss"] == pytest.approx(math.log(257), rel=0.02)
    trained = open_trained(finished)
    assert trained.model.config.num_experts == 4


@pytest.mark.parametrize(
    ("num_ranks", "values"),
    [
        (1, {"parallel__sp": 1}),
        (2, {"parallel__sp": 1, "parallel__dp_shard": 2, "train__recompute": "layer"}),
        pytest.param(2, {"parallel__sp": 2, "parallel__shard_over_sp": True}, marks=pytest.mark.slow),
        pytest.param(4, {"parallel__sp": 2, "parallel__dp_replicate": 2}, marks=pytest.mark.slow),
        pytest.param(2, {"parallel__sp": 2, "model__feed_forward_chunk": 17}, marks=pytest.mark.slow),
    ],
)
def test_the_same_run_on_any_ranks(
    corpus: Path, finished: Path, tmp_path: Path, num_ranks: int, values: dict[str, Any]
) -> None:
    run = tmp_path / "run"
    config = tiny_config(corpus, run, **{**EXPERTS, **values})
    assert run_on_ranks(num_ranks, train_here, config) == [EXIT_DONE] * num_ranks
    keys = (*COMPUTED, *OF_ROUTERS)
    for ours, theirs in zip(metrics(run, *keys), metrics(finished, *keys), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_a_resumed_run_is_bit_equal_to_one_that_was_never_interrupted(
    corpus: Path, finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    for name in ("loss.png", "summary.json", "summary.md", "weights.safetensors"):
        (run / name).unlink()
    assert run_on_ranks(2, train_here, tiny_config(corpus, run, **EXPERTS), True) == [EXIT_DONE] * 2
    keys = (*COMPUTED, *OF_ROUTERS)
    assert metrics(run, *keys) == metrics(finished, *keys)
    expected, found = newest_tensors(finished), newest_tensors(run)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.slow
def test_a_run_in_bfloat16_on_divided_weights_learns_the_same(corpus: Path, finished: Path, tmp_path: Path) -> None:
    values = {**EXPERTS, "parallel__shard_over_sp": True, "train__dtype": "bfloat16", "train__recompute": "selective"}
    assert run_on_ranks(2, train_here, tiny_config(corpus, tmp_path / "run", **values)) == [EXIT_DONE] * 2
    losses, expected = ([r["loss"] for r in metrics(path) if "loss" in r] for path in (tmp_path / "run", finished))
    assert losses == pytest.approx(expected, rel=1e-2) and losses != expected


def checked(config: Config) -> tuple[float, ...]:
    ranks = Ranks(Place(dist.get_rank(), dist.get_world_size()), torch.device("cpu"))
    return verify_config(config, ranks).differences


@pytest.mark.parametrize("values", [{}, {"parallel__shard_over_sp": True}], ids=["whole", "divided"])
def test_ranks_and_one_process_are_compared_in_float64(tmp_path: Path, values: dict[str, Any]) -> None:
    config = tiny_config(tmp_path, tmp_path / "run", **{**EXPERTS, **values})
    for differences in run_on_ranks(2, checked, config):
        assert worst(differences) < 1e-12


def _with_shares_of_its_own_tokens(config: Config) -> int:
    """Each rank balances its experts by itself."""
    with mock.patch("longspan.models.linear_llama3.ranks_of_losses", lambda layout, place: None):
        return train_here(config)


def test_the_first_check_sees_auxiliary_losses_of_single_ranks(corpus: Path, tmp_path: Path) -> None:
    config = tiny_config(corpus, tmp_path / "run", **EXPERTS)
    for kind, text in run_on_ranks(2, raised, _with_shares_of_its_own_tokens, config):
        assert kind == "SelfCheckError" and "do not compute what one process computes" in text


def test_a_plain_model_says_nothing_of_routers() -> None:
    assert shares_of_rank(None) == [] and router_metrics(None, torch.zeros(2, 0)) == {}


def test_shares_of_ranks_are_summed() -> None:
    routing = Routing()
    routing.auxiliary, routing.balance, routing.z, routing.entropy = 1.0, 2.0, 3.0, 4.0
    routing.choices = torch.tensor([[3, 1]])
    found = router_metrics(routing, torch.tensor([shares_of_rank(routing)] * 2))
    assert found == {
        "auxiliary_loss": 2.0,
        "balance_loss": 4.0,
        "z_loss": 6.0,
        "router_entropy": 8.0,
        "fullest_expert": 1.5,
        "idle_experts": 0.0,
    }


def test_a_share_of_the_loss_is_that_of_validation_and_what_the_routers_add() -> None:
    model = LinearLlama3(LinearLlama3Config(257, dim=16, num_layers=2, num_heads=2, hidden_dim=24, num_experts=4))
    batch, routing = PackedBatch.of(torch.randint(257, (2, 12))), Routing()
    share = loss_share(model, batch, None, batch.num_valid_tokens, routing)
    with torch.no_grad():
        cross_entropy = loss_sum(model, batch, None) / batch.num_valid_tokens
    assert float(share.detach()) == pytest.approx(float(cross_entropy) + float(routing.auxiliary), rel=1e-6)
    assert float(routing.auxiliary) > 0.01
