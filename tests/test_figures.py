"""Figures show what was measured: methods are right before they are timed, spans are those of the trace, data gives the drawing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import longspan
from benchmarks import curves, exposed, finetune, methods, modelled, stream
from benchmarks.figures.__main__ import FIGURES
from benchmarks.figures.common import pyplot, with_origin, write
from benchmarks.figures.timeline import _spans
from benchmarks.harness import run_ranks
from tests.compare import relative_error
from tests.ranks import run_on_ranks

ROOT = Path(__file__).resolve().parent.parent

_BY_RANKS = {"2": 1e-3, "4": 3e-3}
_GPUS = dict.fromkeys(("all_gather", "ring", "pipelined", "all_to_all", "two_level", "neighbour"), _BY_RANKS)
DATA: dict[str, dict[str, Any]] = {
    "throughput": {
        "hosts": 4,
        "rate": "1gbit",
        "shape": "B1",
        "seconds": {name: {"1024": [0.1, 0.2, 0.3], "2048": [0.4]} for name in methods.METHODS},
    },
    "traffic": {
        "ranks": 4,
        "shape": "B1",
        "lengths": [1024, 2048],
        "counted_bytes": {"all_to_all": [7, 7], "head exchange (Ulysses)": [1024, 2048]},
        "formula_bytes": {"all_to_all": 7},
        "bytes_a_token": {"head exchange (Ulysses)": 1.0},
        "longest_by_formula": 2**22,
    },
    "waiting": {
        "rate": "1gbit",
        "tokens_a_rank": 1024,
        "shape": "B1",
        "measured_seconds": {"all_gather": _BY_RANKS, "ring": _BY_RANKS},
        "calibrated_seconds": {"all_gather": _BY_RANKS, "ring": _BY_RANKS},
        "modelled_seconds": {"all_gather": _BY_RANKS, "ring": _BY_RANKS},
        "gpus_modelled_seconds": _GPUS,
        "gpus_assumed": {"ranks_per_node": 8},
    },
    "timeline": {
        "hosts": 4,
        "rank": 1,
        "rate": "1gbit",
        "exchange": "all_gather",
        "shape": "B1",
        "spans": [
            {"lane": "computation", "name": "before", "start_ms": 0.0, "ms": 2.0},
            {"lane": "exchange in flight", "name": "exchange", "start_ms": 1.0, "ms": 2.0},
            {"lane": "", "name": "backward", "start_ms": 4.0, "ms": 3.0},
        ],
    },
    "finetune": {
        "length": 256,
        "steps": 3,
        "shape": "4 layers",
        "sides": {
            side: {"losses": [3.0, 2.0, 1.0], "peak_bytes": [2**20] * ranks, "largest_relative_difference": 1e-6}
            for side, ranks in finetune.SIDES.items()
        },
    },
    "curves": {
        "seq_len": 128,
        "steps": 3,
        "shape": "4 layers",
        "sides": {
            side: {"mesh": mesh, "losses": [3.0, 2.0, 1.0], "relative_differences": [0.0, 1e-7, 2e-7]}
            for side, mesh in curves.MESHES.items()
        },
    },
    "stream": {
        "shape": "4 layers",
        "sides": [
            {"side": side, "ranks": ranks, "tokens": tokens, "bytes": 2**28, "seconds": 1.5}
            for side, ranks in stream.LENGTHS
            for tokens in (1024, 2048)
        ],
        "ratios": {"1024": "1.30 (1.20-1.40)"},
        "to_short": {"2048": "1.05 (31 steps, 1.10-1.30 s)"},
    },
    "million": {
        "tokens": 4096,
        "segment_tokens": 1024,
        "shape": "4 layers",
        "tokens_before": 512,
        "losses_before": [8.0, 7.5, 7.0],
        "losses": [7.0, 6.0],
        "seconds": [3.0, 3.5],
        "peak_bytes": 2**29,
        "by_position": {
            name: [{"first": 0, "stop": 32, "nats": 6.5}, {"first": 32, "stop": 4096, "nats": 6.0}]
            for name in ("after 3 steps on 512 tokens", "and 2 on 4,096")
        },
    },
}


def test_curves_that_differ_from_one_process_are_not_reported() -> None:
    for wrong in (2.00003, float("nan")):
        found = [[3.0, 2.0], [3.0, 2.0], [3.0, wrong]]
        with (
            mock.patch.object(curves, "losses", side_effect=found),
            pytest.raises(SystemExit, match="differs from one process by"),
        ):
            curves.measure(128, 2)


@pytest.mark.slow_rows(r"^(traffic|throughput|waiting|timeline|curves)$")
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^(million|finetune)$")
@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_drawn_from_its_raw_data_and_again_the_same(name: str, tmp_path: Path) -> None:
    record = with_origin(name, "a command", DATA[name])
    drawn = []
    for folder in ("first", "again"):
        figure = FIGURES[name].draw(record["data"])
        assert all(axes.get_xlabel() and axes.get_title() for axes in figure.axes)
        paths = write(name, record, figure, tmp_path / folder)
        assert [path.name for path in paths] == [f"{name}.json", f"{name}.svg", f"{name}.png"]
        record = json.loads(paths[0].read_text())
        drawn.append(paths[1].read_bytes())
        pyplot().close(figure)
    assert drawn[0] == drawn[1]
    assert record["command"] == "a command" and {"date", "commit", "processor", "cores"} <= record["machine"].keys()


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "figures").glob("*.json")), ids=lambda path: path.stem)
def test_published_figures_name_their_origin_and_were_not_measured_quickly(path: Path) -> None:
    record = json.loads(path.read_text())
    assert record["command"] == f"python -m benchmarks.figures {path.stem}"
    pyplot().close(FIGURES[path.stem].draw(record["data"]))
    assert path.with_suffix(".svg").exists() and path.with_suffix(".png").exists()


def _refusal_of_other_heads() -> str:
    """What is said of a method that answers for other heads than it was asked for."""

    def other_heads(*args: Any) -> torch.Tensor:
        return methods.METHODS["head exchange (Ulysses)"](*args).roll(1, dims=2)

    with mock.patch.dict(methods.METHODS, wrong=other_heads), pytest.raises(SystemExit) as refused:
        methods.check("wrong", 64)
    return str(refused.value)


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_is_right_on_every_rank(name: str) -> None:
    run_on_ranks(2, methods.check, name, 64)


def test_a_method_that_is_wrong_is_refused() -> None:
    for refusal in run_on_ranks(2, _refusal_of_other_heads):
        assert refusal.startswith("wrong: relative error")


def _bytes(name: str, seq_len: int) -> tuple[int, int]:
    traffic = methods.traffic(name, seq_len, torch.bfloat16)
    return traffic.bytes_sent, traffic.num_messages


def test_the_head_exchange_sends_queries_keys_values_and_outputs_and_their_gradients() -> None:
    seq_len, num_ranks = 64, 4
    per_tensor = seq_len // num_ranks * methods.HEADS * methods.SIZE * 2
    expected = 2 * 4 * per_tensor * (num_ranks - 1) // num_ranks, 4 * (num_ranks - 1)
    assert run_on_ranks(num_ranks, _bytes, "head exchange (Ulysses)", seq_len) == [expected] * num_ranks


def test_the_stretches_of_a_layer_are_all_there() -> None:
    taken = exposed.stretches(32, 1)
    assert all(getattr(taken, name) > 0 for name in taken.__dataclass_fields__)


def _paced(num_milliseconds: int) -> list[tuple[exposed.Side, exposed.Exposed]]:
    seconds = num_milliseconds / 1e3
    taken = exposed.Stretches(*[seconds] * 6)
    return list(exposed.paced(taken, [("all_gather", False), ("ring", False), ("all_gather", True)], 2).items())


def test_a_paced_layer_takes_its_computation_and_what_is_exposed() -> None:
    for rows in run_on_ranks(2, _paced, 5):
        assert [side for side, _ in rows] == [("all_gather", False), ("ring", False), ("all_gather", True)]
        for _, seconds in rows:
            assert seconds.forward - seconds.exposed_forward == pytest.approx(0.015)
            assert seconds.exposed_forward > 0 and seconds.exposed_backward > 0
            assert seconds.modelled_forward is not None and seconds.modelled_backward is not None
        modelled = {side: seconds.modelled_forward for side, seconds in rows}
        assert modelled["all_gather", True] > modelled["all_gather", False]


def _real() -> list[float]:
    layout = longspan.SequenceLayout(64 * dist.get_world_size())
    layer = exposed.Layer(64)
    outputs = [
        layer.forward(layout, name, blocking).detach() for name, blocking in (("all_gather", False), ("ring", True))
    ]
    return [relative_error(outputs[1], y) for y in outputs]


def test_a_blocking_layer_computes_the_same() -> None:
    for error, nothing in run_on_ranks(2, _real):
        assert error < 2e-2
        assert nothing == 0


@pytest.mark.parametrize(
    ("run", "exchange"),
    [
        # A collective shows itself, and so would those by which run_on_ranks checks it.
        pytest.param(run_ranks, "all_gather", marks=pytest.mark.slow),
        (run_on_ranks, "all_to_all"),
    ],
)
def test_the_timeline_has_both_exchanges_in_flight_beside_what_needs_none(
    run: Callable[..., list[Any]], exchange: str
) -> None:
    # The first of two ranks, which waits in both directions.
    spans = run(2, _spans, 64, exchange)[0]
    main = [span for span in spans if span["lane"] in ("computation", "waiting")]
    names = ["before", "between", "after", "waiting", "after", "after", "between", "waiting", "before"]
    assert [span["name"] for span in main] == names
    assert all(later["start_ms"] >= earlier["start_ms"] + earlier["ms"] - 1e-3 for earlier, later in pairwise(main))
    (backward,) = (span for span in spans if span["name"] == "backward")
    flight, flight_backward = (span for span in spans if span["lane"] == "exchange in flight")
    assert flight["start_ms"] < main[3]["start_ms"] + main[3]["ms"] < backward["start_ms"]
    assert backward["start_ms"] < flight_backward["start_ms"] < main[7]["start_ms"] + main[7]["ms"]


def test_the_documentation_has_the_modelled_table_as_the_command_prints_it() -> None:
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    _, _, _, _, *rows = modelled.sequence_parallel_modelled(quick=True).markdown().strip().splitlines()
    assert all(row in page for row in rows)


_PAGES = ("exchange.md", "performance.md", "stream.md", "transformers_training.md")


def test_the_documentation_names_every_figure_and_table() -> None:
    pages = [(ROOT / "docs" / name).read_text(encoding="utf-8") for name in _PAGES]
    for name in FIGURES:
        assert any(re.search(rf"`{name}`|benchmarks\.figures {name}`", page) for page in pages)
