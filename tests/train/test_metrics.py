"""The metrics file survives a crash, and a resumed run makes no step twice in it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from longspan.errors import CheckpointError
from longspan.train.metrics import MetricsFile, plot_losses
from longspan.train.trackers import TensorBoard


def test_numbers_come_back_exactly_and_what_is_not_finite_is_null(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    assert metrics.read() == []
    metrics.append({"step": 1, "loss": 0.1 + 0.2, "lr": math.inf})
    assert metrics.read() == [{"step": 1, "loss": 0.1 + 0.2, "lr": None}]


def test_the_largest_numbers_of_a_step_are_read_again(tmp_path: Path) -> None:
    """The gradient of a run that diverges, before it is infinite; operations a second of many thousand GPUs."""
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    record = {"step": 1, "loss": 4e37, "gradient_norm": 3e38, "flops_per_second": 4e19}
    metrics.append(record)
    metrics.cut_after(1)
    assert metrics.read() == [record]


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = MetricsFile(tmp_path / "metrics.jsonl", [TensorBoard(tmp_path / "events")])
    for step in (1, 2, 3):
        metrics.append({"step": step, "loss": 0.5 * step, "skipped": False})
    metrics.close()
    metrics.append({"step": 3, "loss": 7.0})
    metrics.close()
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.5), (2, 1.0), (3, 7.0)]


def test_later_steps_are_cut_off_with_a_half_written_line(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    for step in (1, 2, 2, 3):
        metrics.append({"step": step})
    with metrics.path.open("a") as file:
        file.write('{"step": 4, "lo')
    metrics.cut_after(2)
    assert metrics.path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 2}\n'
    metrics.append({"step": 3})
    assert [record["step"] for record in metrics.read()] == [1, 2, 2, 3]


def test_the_validation_of_a_last_step_is_not_written_twice(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    for step in (1, 2):
        metrics.append({"step": step, "loss": 1.0})
        metrics.append({"step": step, "validation_loss": 1.0})
    metrics.cut_after(2, validates_again=True)
    assert [sorted(record) for record in metrics.read()] == [
        ["loss", "step"],
        ["step", "validation_loss"],
        ["loss", "step"],
    ]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.path.write_text(json.dumps({"step": 1}) + "\nxx\n" + json.dumps({"step": 2}) + "\n")
    with pytest.raises(CheckpointError, match=r"metrics.jsonl, line 2, is not JSON"):
        metrics.read()


def test_the_plot_is_a_png(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": None},
        {"step": 2, "validation_loss": 1.5},
    ]
    plot_losses(records, 3.0, "unigram", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
