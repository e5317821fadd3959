"""Shares by speed: given, measured before the first step, said, kept in checkpoints; the same training whatever they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from longspan.commands.train import parse_train
from longspan.errors import CheckpointError, ConfigError
from longspan.launch import Place
from longspan.layout import SequenceLayout
from longspan.parallel import MeshDegrees
from longspan.plan.training import Operations
from longspan.train.balance import Balance, Speed, balance_of_checkpoint, measured_balance, operations_of_documents
from longspan.train.checkpoint import newest_checkpoint
from longspan.train.config import Config, from_mapping, read_toml, to_toml
from longspan.train.config_checks import check
from longspan.train.loading import SavedCheckpoint
from longspan.train.ranks import Ranks
from longspan.train.rate import operations_of_model
from tests.ranks import run_on_ranks
from tests.train.checkpoints import load_checkpoint
from tests.train.tiny import COMPUTED, metrics, tiny_config, train_here

# A rank whose layers are slower twice, and whose attention is slower four times.
FAST, SLOW = Speed(2e9, 8e9), Speed(1e9, 2e9)


def train_with_tokens(config: Config, resume: bool, speeds: list[Speed] | None) -> tuple[int, set[int]]:
    """Train; the exit code, and how many tokens this rank's layouts have had. speeds: what is measured, None is nothing."""
    seen: set[int] = set()
    original = SequenceLayout.shard

    def shard(layout: SequenceLayout, *arguments: Any) -> torch.Tensor:
        seen.add(layout.num_local_tokens)
        return original(layout, *arguments)

    def measure(*_: Any) -> Speed:
        if speeds is None:
            raise AssertionError("measured")
        return speeds[dist.get_rank()]

    with (
        mock.patch.object(SequenceLayout, "shard", shard),
        mock.patch("longspan.train.balance.measured_speed", measure),
    ):
        return train_here(config, resume), seen


def short(corpus: Path, run: Path, steps: int = 2, **values: Any) -> Config:
    given = {"validation__every": 0, "sample__tokens": 0, "train__batch_tokens": 122, "train__steps": steps}
    return tiny_config(corpus, run, **given, **values)


def balance_kept(run: Path) -> Any:
    return load_checkpoint(newest_checkpoint(run / "checkpoints")).state["balance"]


def test_uneven_shares_train_as_one_process_does(corpus: Path, tmp_path: Path) -> None:
    alone, given, measured = (tmp_path / name for name in ("alone", "given", "measured"))
    run_on_ranks(1, train_here, short(corpus, alone, parallel__sp=1))
    (_, first), (_, second) = run_on_ranks(
        2, train_with_tokens, short(corpus, given, parallel__balance=[1, 4]), False, None
    )
    # Two rows of 61 tokens in one, for their documents.
    assert 24 in first and 98 in second
    assert json.loads((given / "summary.json").read_text())["balance"] == {"groups": [[1.0, 4.0]], "speeds": []}
    assert balance_kept(given) is None

    config = short(corpus, measured, parallel__balance="measured")
    (_, first), (_, second) = run_on_ranks(2, train_with_tokens, config, False, [SLOW, FAST])
    kept = balance_kept(measured)
    slow, fast = kept["groups"][0]
    assert kept["speeds"] == [[1e9, 2e9], [2e9, 8e9]] and 2.0 < fast / slow < 4.0
    assert round(122 * slow) in first and round(122 * fast) in second
    for run in (given, measured):
        for ours, theirs in zip(metrics(run, *COMPUTED), metrics(alone, *COMPUTED), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)

    # It goes on with what was measured, unless it is told to measure again.
    config = short(corpus, measured, 3, parallel__balance="measured")
    (_, first), (_, second) = run_on_ranks(2, train_with_tokens, config, True, None)
    assert round(122 * slow) in first and round(122 * fast) in second
    assert balance_kept(measured) == kept
    config = short(corpus, measured, 4, parallel__balance="remeasured")
    run_on_ranks(2, train_with_tokens, config, True, [FAST, SLOW])
    assert balance_kept(measured)["groups"][0] == [fast, slow]


def measure_here(degrees: MeshDegrees, model: dict[str, Any]) -> Balance:
    ranks = Ranks(Place(dist.get_rank(), dist.get_world_size()), torch.device("cpu"))
    ranks.arrange(degrees)
    config = from_mapping({"model": {"dim": 16, "hidden_dim": 24, **model}, "train": {"seq_len": 64}})
    before = torch.get_rng_state()
    balance = measured_balance(config, 300, ranks)
    assert torch.equal(torch.get_rng_state(), before)
    return balance


def test_every_rank_measures_and_comes_to_the_same_shares() -> None:
    found = run_on_ranks(2, measure_here, MeshDegrees(sp=2), {})
    assert found[0] == found[1]
    (weights,) = found[0].groups
    assert weights is not None and len(weights) == 2 and min(weights) > 0
    assert all(speed.layers > 0 and speed.attention > 0 for speed in found[0].speeds)
    # Each group of ranks that share a sequence has its own; without softmax layers there is one rate.
    found = run_on_ranks(2, measure_here, MeshDegrees(dp_shard=2, sp=1), {"pattern": "L", "operator": "gla"})
    assert found[0] == found[1] and [speed.attention for speed in found[0].speeds] == [0.0, 0.0]
    assert found[0].groups == ((1.0,), (1.0,))


def test_documents_shorten_what_attention_is_counted_for() -> None:
    config = from_mapping({"train": {"seq_len": 1000}})
    model = config.model.build(300)
    whole = operations_of_model(model, 1000)
    lengths = np.zeros(64, dtype=np.int64)
    lengths[3], lengths[9] = 500, 500
    short, longer = operations_of_model(model, 12), operations_of_model(model, 768)
    found = operations_of_documents(model, config, lengths)
    assert found.rest == pytest.approx(whole.rest)
    assert found.attention == pytest.approx(1000 * (short.attention / 12 + longer.attention / 768) / 2)
    # Where documents follow one another without a reset, a token sees all before it.
    joined = from_mapping({"train": {"seq_len": 1000}, "data": {"documents": "concatenate"}})
    assert operations_of_documents(model, joined, lengths) == whole
    assert isinstance(whole, Operations)


def test_a_balance_is_an_option(tmp_path: Path) -> None:
    for given, kept in ((["measured"], ("measured",)), (["2", "1.5"], (2.0, 1.5))):
        config = parse_train(["--parallel.balance", *given])[0]
        assert config.parallel.balance == kept
        (tmp_path / "c.toml").write_text(to_toml(config))
        assert read_toml(tmp_path / "c.toml").parallel == config.parallel
    (tmp_path / "c.toml").write_text("[parallel]\nbalance = [3, 0.5]\n")
    assert read_toml(tmp_path / "c.toml").parallel.weights == (3.0, 0.5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"balance": [1, -2]},
            r"parallel.balance: weights must be finite numbers of at least 0; got -2.0 \(float\) for rank 1",
        ),
        ({"balance": [0, 0]}, r"parallel.balance: weights are zero for all 2 ranks"),
        ({"balance": [1, 2, 3]}, r"parallel.balance: weights must be one number for each of the 2 ranks; got 3"),
        (
            {"balance": "fast"},
            r"parallel.balance has 'fast'; it must be one of 'even', 'measured', 'remeasured', or a list of",
        ),
        (
            {"balance": ["even", 1]},
            r"parallel.balance is \['even', 1.0\]; it must be 'even', 'measured', 'remeasured', or one",
        ),
        ({"balance": []}, r"parallel.balance is \[\]; it must be"),
        ({"balance": [True, 1]}, r"parallel.balance has True"),
    ],
)
def test_a_balance_that_is_none_is_refused_before_any_rank_starts(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(from_mapping({"parallel": values}))


def test_what_is_measured_is_not_deterministic() -> None:
    with pytest.raises(ConfigError, match=r"train.deterministic is True and parallel.balance 'measured'.*as numbers"):
        check(from_mapping({"parallel": {"balance": "measured"}, "train": {"deterministic": True}}))
    check(from_mapping({"parallel": {"balance": [2, 1]}, "train": {"deterministic": True}}))


def test_a_balance_of_other_ranks_is_not_taken_and_one_of_another_form_refused() -> None:
    ranks = Ranks(Place(0, 2), torch.device("cpu"))
    record = Balance(((0.25, 0.75),), (FAST, SLOW)).as_json()
    assert balance_of_checkpoint(SavedCheckpoint(Path(), 3, {"balance": record}, {}, {}), ranks) == Balance(
        ((0.25, 0.75),), (FAST, SLOW)
    )
    assert balance_of_checkpoint(SavedCheckpoint(Path(), 3, {}, {}, {}), ranks) is None
    for others in ([[0.5, 0.25, 0.25]], [[0.5, 0.5], [0.5, 0.5]]):
        saved = SavedCheckpoint(Path(), 3, {"balance": record | {"groups": others}}, {}, {})
        assert balance_of_checkpoint(saved, ranks) is None
    for wrong in (3, {}, {"groups": [["x", 1]], "speeds": []}):
        with pytest.raises(CheckpointError, match="step 3 has no shares of ranks that this version knows"):
            balance_of_checkpoint(SavedCheckpoint(Path(), 3, {"balance": wrong}, {}, {}), ranks)
