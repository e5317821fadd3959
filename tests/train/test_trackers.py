"""What goes to Weights & Biases is what the metrics file has, and nothing that is not installed is asked for."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from longspan.errors import ConfigError
from longspan.train.config import Config, from_mapping
from longspan.train.config_checks import check
from longspan.train.metrics import MetricsFile
from longspan.train.trackers import TensorBoard, Tracker, WeightsAndBiases
from tests.ranks import raised, run_on_ranks
from tests.train.tiny import tiny_config, train_here, write_corpus


class _Noting(Tracker):
    """Notes the keys of what it is given, and how it is closed."""

    def __init__(self) -> None:
        self.noted: list[Any] = []

    def write(self, record: dict[str, Any]) -> None:
        self.noted.append("validation" if "validation_loss" in record else "step")

    def close(self, failed: bool = False) -> None:
        self.noted.append("failed" if failed else "closed")


def _noted(config: Config, resume: bool) -> list[Any]:
    tracker = _Noting()
    with mock.patch("longspan.train.trainer.build_trackers", lambda config, folder: [tracker]):
        if config.optim.lr < 1.0:
            train_here(config, resume)
        else:
            assert raised(train_here, config, resume)[0] == "TrainingError"
    return tracker.noted


def test_a_tracker_is_closed_when_all_is_written_and_when_a_run_fails(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "text")
    values: dict[str, Any] = {"parallel__sp": 1, "train__steps": 2, "validation__every": 0, "sample__tokens": 0}
    config = tiny_config(corpus, tmp_path / "run", **values)
    assert run_on_ranks(1, _noted, config, False) == [["step", "step", "validation", "closed"]]
    # At its end already.
    assert run_on_ranks(1, _noted, config, True) == [["validation", "closed"]]
    diverges = {"optim__lr": 1e30, "optim__warmup_steps": 0, "train__max_skipped_steps": 1, "checkpoint__every": 0}
    config = tiny_config(corpus, tmp_path / "diverged", **values | diverges)
    assert run_on_ranks(1, _noted, config, False) == [["step", "step", "failed"]]


def test_tensorboard_keeps_the_last_step_of_a_run_that_validates_again(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = MetricsFile(tmp_path / "metrics.jsonl", [TensorBoard(tmp_path / "events")])
    metrics.append({"step": 1, "loss": 0.5})
    metrics.append({"step": 2, "loss": 0.25})
    metrics.close()
    metrics.append({"step": 2, "validation_loss": 0.75})
    metrics.close()
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.5), (2, 0.25)]


@pytest.mark.slow
def test_weights_and_biases_gets_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    run = tmp_path / "run"
    run.mkdir()
    tracker = WeightsAndBiases(run, "longspan", Config())
    metrics = MetricsFile(run / "metrics.jsonl", [tracker])
    metrics.append({"step": 1, "loss": 2.5, "flops_share": None})
    metrics.append({"step": 1, "validation_loss": 2.25})
    metrics.append({"step": 2, "loss": 2.0})
    summary = dict(tracker._run.summary)
    metrics.close()
    assert {key: summary[key] for key in ("step", "loss", "validation_loss")} == {
        "step": 2,
        "loss": 2.0,
        "validation_loss": 2.25,
    }
    (written,) = (run / "wandb").glob("offline-run-*/*.wandb")
    assert written.stat().st_size > 0


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"pip install 'longspan\[{name}\]'"):
        check(from_mapping({"run": {name: True}}))
