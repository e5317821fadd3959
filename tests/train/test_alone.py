"""A run over ranks says what one process would have taken, and leaves its weights as they are."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from longspan.models.feed_forward import SwiGLU
from longspan.models.mixers import Context
from longspan.train.alone import measure_alone, take_steps
from longspan.train.config import to_mapping
from tests.ranks import run_on_ranks
from tests.train.tiny import newest_tensors, tiny_config, train_here, write_corpus


def trained(tmp_path: Path, **values: Any) -> Path:
    given: dict[str, Any] = {"parallel__exchange": "all_gather", "run__measure_alone": True, **values}
    config = tiny_config(write_corpus(tmp_path / "text"), tmp_path / "run", **given)
    run_on_ranks(2, train_here, config)
    return tmp_path / "run"


# The parts of it run in make test, below.
@pytest.mark.slow
def test_a_split_run_says_what_it_bought(tmp_path: Path) -> None:
    run = trained(tmp_path)
    summary = json.loads((run / "summary.json").read_text())
    # Tiny models are all process: both take the same.
    assert summary["memory_bytes_alone"] == pytest.approx(summary["memory_bytes"], rel=0.5)
    assert summary["tokens_per_second_alone"] > 0
    saved = newest_tensors(run)
    for name, weight in load_file(run / "weights.safetensors").items():
        assert weight.equal(saved[f"model/{name}"]), name


@pytest.mark.parametrize("values", [{"train__recompute": "layer"}, {"train__dtype": "bfloat16"}])
def test_one_process_computes_as_the_run_does(tmp_path: Path, values: dict[str, str]) -> None:
    config = tiny_config(tmp_path, tmp_path / "run", **values)
    told = {
        "config": to_mapping(config),
        "vocab_size": 257,
        "num_sequences": 1,
        "document_starts": None,
        "threads": torch.get_num_threads(),
        "device": "cpu",
    }
    found = []
    forward = SwiGLU.forward

    def noted(layer: SwiGLU, x: torch.Tensor, context: Context) -> tuple[torch.Tensor, None]:
        found.append(x.dtype)
        return forward(layer, x, context)

    with mock.patch.object(SwiGLU, "forward", noted):
        assert take_steps(told).tokens_per_second > 0
    layers, steps = 2, 3
    runs = 2 if "train__recompute" in values else 1
    dtype = torch.bfloat16 if "train__dtype" in values else torch.float32
    assert found == [dtype] * (layers * steps * runs)


@pytest.mark.parametrize(
    ("outcome", "said"),
    [
        (
            subprocess.CompletedProcess([], -9, "", ""),
            "was killed by SIGKILL (the system does this when memory runs out)",
        ),
        (
            subprocess.CompletedProcess([], 1, "", "Traceback\nMemoryError: no"),
            "ended with exit code 1: MemoryError: no",
        ),
        (subprocess.TimeoutExpired([], 300.0), "took longer than 300 s, half of parallel.timeout_seconds"),
        (OSError(11, "Resource temporarily unavailable"), "could not be started: [Errno 11] Resource temporarily"),
    ],
)
def test_a_process_that_cannot_take_what_the_ranks_share_is_said(tmp_path: Path, outcome: Any, said: str) -> None:
    headings: list[tuple[str, str]] = []
    batches = SimpleNamespace(batch=lambda *place: SimpleNamespace(document_starts=None))
    trainer: Any = SimpleNamespace(
        config=tiny_config(tmp_path, tmp_path / "run", run__measure_alone=True),
        ranks=SimpleNamespace(dp=1, sp=2, device="cpu"),
        data=SimpleNamespace(vocab_size=257),
        batches=batches,
        report=SimpleNamespace(heading=lambda *line: headings.append(line)),
    )
    ended: dict[str, Any] = {"side_effect": outcome} if isinstance(outcome, Exception) else {"return_value": outcome}
    with mock.patch("longspan.train.alone.subprocess.run", **ended):
        assert measure_alone(trainer) is None
    ((name, text),) = headings
    assert name == "alone" and text.startswith(f"one process that was to take whole sequences {said}")


# The summary of such a run is that of every other run of these tests.
@pytest.mark.slow_rows(r"^values[12]$")
@pytest.mark.parametrize("values", [{"parallel__sp": 1}, {"train__check_tokens": 100}, {"run__measure_alone": False}])
def test_nothing_is_compared_where_one_process_is_not_asked(tmp_path: Path, values: dict[str, Any]) -> None:
    assert "memory_bytes_alone" not in json.loads((trained(tmp_path, **values) / "summary.json").read_text())


@pytest.mark.parametrize("values", [{"parallel__sp": 1}, {"train__check_tokens": 100}, {"run__measure_alone": False}])
def test_no_process_is_started_where_one_is_not_asked(tmp_path: Path, values: dict[str, Any]) -> None:
    config = tiny_config(tmp_path, tmp_path / "run", **({"run__measure_alone": True} | values))
    ranks = SimpleNamespace(dp=2 // config.parallel.sp, sp=config.parallel.sp, device="cpu")
    trainer: Any = SimpleNamespace(config=config, ranks=ranks)
    with mock.patch("longspan.train.alone.subprocess.run", side_effect=AssertionError):
        assert measure_alone(trainer) is None
