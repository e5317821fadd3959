"""``train.init``: a run begins with the weights of another one, divided over ranks or not, and refuses those of another model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from longspan.launch import Place, StopRequest
from longspan.train.config import Config
from longspan.train.ranks import Ranks
from longspan.train.run import train_on
from longspan.train.trained import open_trained
from tests.compare import relative_error, worst
from tests.ranks import run_on_ranks
from tests.shared import made_once
from tests.train.tiny import tiny_config, train_here, write_corpus

QUIET: dict[str, Any] = {"sample__tokens": 0, "validation__every": 0, "train__steps": 2}


def train(config: Config) -> int:
    return train_on(Ranks(Place(), torch.device("cpu")), config, StopRequest())


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on one process, and beside it the text that it was trained on."""

    def make(folder: Path) -> str:
        assert train(tiny_config(write_corpus(folder / "text"), folder / "run", **QUIET, parallel__sp=1)) == 0
        return str(folder / "run")

    return Path(made_once(tmp_path_factory, "init-run", make))


def config_of(first: Path, run: Path, **values: Any) -> Config:
    """A run that begins with the weights of the first, and hardly changes them."""
    given = {**QUIET, "optim__lr": 1e-9, "train__seed": 5, "train__init": str(first), **values}
    given = {key: value for key, value in given.items() if value is not None}
    return tiny_config(first.parent / "text", run, **given)


def changes(first: Path, run: Path) -> float:
    before, after = open_trained(first).model, open_trained(run).model
    pairs = zip(before.parameters(), after.parameters(), strict=True)
    # A vector of zeros is changed by what it becomes.
    return worst(relative_error(theirs, ours, floor=1.0) for ours, theirs in pairs)


def test_a_run_begins_with_the_weights_of_another(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(first, tmp_path / "run", parallel__sp=1)
    assert train(config) == 0
    assert f"at first the checkpoint of step 2 in {first}" in capsys.readouterr().out
    assert changes(first, tmp_path / "run") < 1e-6
    assert train(config_of(first, tmp_path / "other", parallel__sp=1, train__init=None)) == 0
    assert changes(first, tmp_path / "other") > 1e-2


def test_it_goes_on_from_its_own_checkpoint(first: Path, tmp_path: Path) -> None:
    """Also where the run that it began with is gone."""
    run = tmp_path / "run"
    config = config_of(first, run, parallel__sp=1, optim__lr=1e-2, checkpoint__every=1)
    assert train(config) == 0
    moved = config_of(first, run, parallel__sp=1, optim__lr=1e-9, train__steps=3, train__init=str(tmp_path / "gone"))
    before = open_trained(run).model.head.weight
    assert run_on_ranks(1, train_here, moved, True) == [0]
    assert relative_error(open_trained(run).model.head.weight, before) < 1e-6


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^weights$")
@pytest.mark.parametrize("source", ["checkpoint", "weights"])
def test_divided_weights_begin_with_them_too(first: Path, tmp_path: Path, source: str) -> None:
    begun = first
    if source == "weights":
        begun = tmp_path / "begun"
        begun.mkdir()
        for name in ("config.toml", "weights.safetensors"):
            (begun / name).write_bytes((first / name).read_bytes())
        (begun / "tokenizer.json").write_text('{"kind": "bytes"}')
    config = config_of(first, tmp_path / "run", parallel__dp_shard=2, parallel__sp=1, train__init=str(begun))
    assert run_on_ranks(2, train_here, config) == [0, 0]
    assert changes(first, tmp_path / "run") < 1e-6


def refused(config: Config, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(Exception) as refusal:
        train(config)
    assert type(refusal.value).__name__ in ("CheckpointError", "ConfigError", "DataError")
    return str(refusal.value)


def test_weights_of_another_model_or_tokenizer_are_refused(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = config_of(first, tmp_path / "a", parallel__sp=1, model__hidden_dim=25, model__num_layers=3)
    shown = refused(odd, capsys)
    assert "the weights of the checkpoint of step 2 are not those of this model" in shown
    assert "blocks.0.feed_forward.up_proj.weight: (24, 16) there, (25, 16) here" in shown
    assert "blocks.2.mixer_norm.weight: missing there, (16,) here" in shown
    assert f"Give the [model] section of {first / 'config.toml'}" in shown
    values = {"data__tokenizer": "bpe", "data__vocab_size": 257}
    shown = refused(config_of(first, tmp_path / "b", parallel__sp=1, **values), capsys)
    assert f"the data was prepared with another tokenizer than that of {first}" in shown
    shown = refused(config_of(first, tmp_path / "c", parallel__sp=1, train__init=str(tmp_path)), capsys)
    assert "is no run folder" in shown
