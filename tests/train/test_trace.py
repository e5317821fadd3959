"""A traced step shows on every rank what ran when, under the names that the documentation gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.profiler import profile

from longspan.comm.profiling import named_range
from longspan.errors import ConfigError
from longspan.train.snapshot import MemorySnapshot
from tests.ranks import run_on_ranks
from tests.train.tiny import metrics, tiny_config, train_here, write_corpus

OURS = [
    "longspan.train.forward",
    "longspan.write",
    "longspan.exchange.start",
    "longspan.read",
    "longspan.exchange.wait",
    "longspan.train.backward",
    "longspan.exchange.start.backward",
    "longspan.exchange.wait.backward",
    "longspan.train.sum_gradients",
    "longspan.train.update",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps on two ranks, one linear layer in the model, whose second step was traced."""
    folder = tmp_path_factory.mktemp("traced")
    values = {"model__pattern": "L", "model__num_layers": 1, "parallel__exchange": "all_to_all", "run__trace_step": 2}
    config = tiny_config(write_corpus(folder / "text"), folder / "run", train__steps=3, **values)
    run_on_ranks(2, train_here, config)
    return folder / "run"


def trace(run: Path, rank: int) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((run / "traces" / f"step-00000002-rank-{rank}.json").read_text())
    return loaded


def ranges(run: Path, rank: int) -> list[dict[str, Any]]:
    """The named ranges of a trace, by their starts."""
    named = [event for event in trace(run, rank)["traceEvents"] if event.get("cat") == "user_annotation"]
    return sorted((event for event in named if event["name"].startswith("longspan.")), key=lambda event: event["ts"])


def test_every_rank_writes_one_file_that_names_its_step(run: Path) -> None:
    assert sorted(path.name for path in (run / "traces").iterdir()) == [
        "step-00000002-rank-0.json",
        "step-00000002-rank-1.json",
    ]
    for rank in range(2):
        assert (trace(run, rank)["step"], trace(run, rank)["rank"]) == (2, rank)
    assert [record["step"] for record in metrics(run, "step", "loss") if "loss" in record] == [1, 2, 3]


@pytest.mark.parametrize("rank", [0, 1])
def test_write_exchange_and_read_stand_in_their_order_inside_the_step(run: Path, rank: int) -> None:
    step, *others = ranges(run, rank)
    assert step["name"] == "longspan.train.step 2"
    assert all(event["ts"] + event["dur"] <= step["ts"] + step["dur"] for event in others)
    assert [event["name"] for event in others if event["name"] != "longspan.exchange.work"] == OURS


@pytest.mark.parametrize("rank", [0, 1])
def test_what_runs_beside_the_main_thread_is_shown_with_its_own(run: Path, rank: int) -> None:
    events = ranges(run, rank)
    work = [event for event in events if event["name"] == "longspan.exchange.work"]
    assert len(work) == 2
    (thread,) = {event["tid"] for event in work}
    assert thread not in {event["tid"] for event in events if event["name"] != "longspan.exchange.work"}


@pytest.mark.parametrize("rank", [0, 1])
def test_collectives_are_shown(run: Path, rank: int) -> None:
    assert any("all_to_all" in event["name"] for event in trace(run, rank)["traceEvents"])


def test_a_step_that_never_comes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run.trace_step 7 comes after the last step, train.steps 6"):
        tiny_config(tmp_path, tmp_path, run__trace_step=7)
    with pytest.raises(ConfigError, match=r"run.trace_step is 0; it must be at least 1"):
        tiny_config(tmp_path, tmp_path, run__trace_step=0)


def test_a_range_shows_while_a_profiler_is_on_and_does_nothing_otherwise() -> None:
    without = named_range("unseen")
    with profile() as profiler, named_range("seen"), without:
        torch.ones(1).add_(1)
    names = {event.key for event in profiler.key_averages()}
    assert "seen" in names
    assert "unseen" not in names


def test_memory_is_recorded_in_the_step_that_is_asked_for_alone(tmp_path: Path) -> None:
    """What is asked of PyTorch, which writes the file on a GPU."""
    asked: list[Any] = []
    with (
        mock.patch.object(torch.cuda.memory, "_record_memory_history", lambda **options: asked.append(options)),
        mock.patch.object(torch.cuda.memory, "_dump_snapshot", asked.append),
    ):
        snapshot = MemorySnapshot(tmp_path / "traces", 2, rank=1)
        for step in (1, 2, 3):
            with snapshot.of(step):
                asked.append(step)
        path = str(tmp_path / "traces" / "step-00000002-rank-1-memory.pickle")
        assert asked == [1, {"max_entries": 1_000_000}, 2, path, {"enabled": None}, 3]
        assert (tmp_path / "traces").is_dir()
        asked.clear()
        with pytest.raises(RuntimeError, match="out of memory"), snapshot.of(2):
            raise RuntimeError("out of memory")
        assert asked == [{"max_entries": 1_000_000}, path, {"enabled": None}]
