"""What goes to Weights & Biases is what the metrics file has, and nothing that is not installed is asked for."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from longspan.errors import ConfigError
from longspan.train.config import Config, from_mapping
from longspan.train.config_checks import check
from longspan.train.metrics import MetricsFile
from longspan.train.trackers import WeightsAndBiases


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
