"""Runs whose weights are divided over ranks: they go on from their checkpoints, and leave whole weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from longspan.launch import EXIT_DONE
from longspan.train.config import Config
from longspan.train.trainer import Trainer
from tests.compare import relative_error, worst
from tests.ranks import run_on_ranks
from tests.shared import made_once
from tests.train.tiny import COMPUTED, interrupted, metrics, newest_tensors, tiny_config, train_here

DIVIDED = {"parallel__sp": 2, "parallel__shard_over_sp": True, "parallel__exchange": "all_gather"}


@pytest.fixture(scope="session")
def divided(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of six steps on two ranks that hold half of the weights each."""

    def make(folder: Path) -> str:
        config = tiny_config(corpus, folder / "run", **DIVIDED)
        assert run_on_ranks(2, train_here, config) == [EXIT_DONE] * 2
        return str(folder / "run")

    return Path(made_once(tmp_path_factory, "divided-run", make))


# With whole weights it runs in make test, in `test_resume.py`; what ranks save of divided ones, in `test_storage.py`.
@pytest.mark.slow
def test_a_resumed_run_is_bit_equal_to_one_that_was_never_interrupted(
    corpus: Path, divided: Path, tmp_path: Path
) -> None:
    run = interrupted(divided, tmp_path / "run", after=3)
    assert run_on_ranks(2, train_here, tiny_config(corpus, run, **DIVIDED), True) == [EXIT_DONE] * 2
    assert metrics(run, *COMPUTED) == metrics(divided, *COMPUTED)
    expected, found = newest_tensors(divided), newest_tensors(run)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert (run / "weights.safetensors").read_bytes() == (divided / "weights.safetensors").read_bytes()


def test_one_process_goes_on_with_the_whole_weights(corpus: Path, divided: Path, tmp_path: Path) -> None:
    run = interrupted(divided, tmp_path / "run", after=3)
    assert run_on_ranks(1, train_here, tiny_config(corpus, run, parallel__sp=1), True) == [EXIT_DONE]
    for ours, theirs in zip(metrics(run, *COMPUTED), metrics(divided, *COMPUTED), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    whole, alone = load_file(divided / "weights.safetensors"), load_file(run / "weights.safetensors")
    assert whole.keys() == alone.keys()
    assert worst(relative_error(whole[name], alone[name]) for name in whole) < 1e-2


def _without_check(config: Config) -> int:
    with mock.patch.object(Trainer, "check", side_effect=AssertionError("checked")):
        return train_here(config)


def test_a_run_that_leaves_its_check_out_is_the_same_run(corpus: Path, divided: Path, tmp_path: Path) -> None:
    config = tiny_config(corpus, tmp_path / "run", **DIVIDED, train__check_tokens=0)
    assert run_on_ranks(2, _without_check, config) == [EXIT_DONE] * 2
    assert metrics(tmp_path / "run", *COMPUTED) == metrics(divided, *COMPUTED)


@pytest.mark.parametrize(
    "values",
    [
        {"train__dtype": "bfloat16", "train__recompute": "selective", **DIVIDED},
        pytest.param({"train__dtype": "bfloat16", "train__recompute": "layer"}, marks=pytest.mark.slow),
    ],
)
def test_a_run_in_bfloat16_is_checked_in_float32_and_learns_the_same(
    corpus: Path, divided: Path, tmp_path: Path, values: dict[str, Any]
) -> None:
    run = tmp_path / "run"
    assert run_on_ranks(2, train_here, tiny_config(corpus, run, **values)) == [EXIT_DONE] * 2
    losses, expected = ([r["loss"] for r in metrics(path) if "loss" in r] for path in (run, divided))
    assert losses == pytest.approx(expected, rel=1e-2) and losses != expected
    weights = load_file(run / "weights.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
