"""One layer on one rank over time: the exchange in flight beside the computation that hides it, forward and backward."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, _ExperimentalConfig, profile, record_function

import longspan
from benchmarks.cluster import Cluster
from benchmarks.exposed import HEADS, OPERATOR, SIZE, WIDTH, Layer
from benchmarks.figures.common import Data, FigureMaker, in_words, pyplot

_LANES = ("computation", "waiting", "exchange in flight")
_COLOURS = {
    "before": "#56B4E9",
    "write": "#0072B2",
    "between": "#009E73",
    "after": "#E69F00",
    "waiting": "#D55E00",
    "exchange": "#CC79A7",
}
_NAMES = {
    "before": "keys, values, gates; write",
    "between": "query and output gate",
    "after": "read, output",
    "waiting": "waiting",
    "exchange": "exchange of states / of their gradients",
}


def _spans(num_tokens: int, exchange: str) -> list[dict[str, Any]]:
    """Spans (lane, name, ms from the start, ms) of this rank, in a layer after two that warm up; to be called on every rank."""
    layout = longspan.SequenceLayout(num_tokens * dist.get_world_size())
    layer = Layer(num_tokens)

    def run() -> None:
        y = layer.forward(layout, exchange)
        with record_function("backward"):
            torch.autograd.grad(y, layer.leaves, layer.grad)

    for _ in range(2):
        run()
    dist.barrier()
    everywhere = _ExperimentalConfig(profile_all_threads=True)
    with profile(activities=[ProfilerActivity.CPU], experimental_config=everywhere) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return _of_trace(json.loads(path.read_text())["traceEvents"])


def _of_trace(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found: dict[str, list[tuple[float, float]]] = {}
    for event in events:
        if event.get("ph") == "X" and event.get("cat") in ("user_annotation", "cpu_op"):
            start = float(event["ts"]) / 1e3
            found.setdefault(event["name"], []).append((start, start + float(event["dur"]) / 1e3))

    def only(name: str) -> tuple[float, float]:
        (span,) = found[name]
        return span

    before, between, after, backward = (only(name) for name in ("before", "between", "after", "backward"))
    wait, wait_backward = only("longspan.exchange.wait"), only("longspan.exchange.wait.backward")
    start_backward = only("longspan.exchange.start.backward")
    # A topology's own thread shows its work; a collective shows itself, from its start until it is done.
    flights = found.get("longspan.exchange.work") or [
        span for name, spans in found.items() if name.startswith("gloo:") for span in spans
    ]
    spans = [
        ("computation", "before", before),
        ("computation", "between", between),
        # What the layer does until it waits, and from then on.
        ("computation", "after", (after[0], wait[0])),
        ("waiting", "waiting", wait),
        ("computation", "after", (wait[1], after[1])),
        ("computation", "after", (backward[0], start_backward[1])),
        ("computation", "between", (start_backward[1], wait_backward[0])),
        ("waiting", "waiting", wait_backward),
        ("computation", "before", (wait_backward[1], backward[1])),
        *(("exchange in flight", "exchange", flight) for flight in sorted(flights)),
    ]
    return [
        {"lane": lane, "name": name, "start_ms": start - before[0], "ms": stop - start}
        for lane, name, (start, stop) in spans
    ] + [{"lane": "", "name": "backward", "start_ms": backward[0] - before[0], "ms": backward[1] - backward[0]}]


def _measure(quick: bool) -> Data:
    # Two ranks, so that each has a core; the first of them waits in both directions.
    hosts, rank, rate, exchange = 2, 0, "100mbit", "all_gather"
    # Enough to hide an exchange of 90 ms, and so few that it can be seen.
    num_tokens = 128 if quick else 8192
    with Cluster(hosts, rate) as cluster:
        spans = cluster.call(_spans, num_tokens, exchange)[rank]
    return {
        "hosts": hosts,
        "rank": rank,
        "rate": rate,
        "exchange": exchange,
        "shape": f"{OPERATOR} B1 H{HEADS} K = V = {SIZE}, width {WIDTH}, float32, {num_tokens:,} tokens per rank",
        "source": "torch.profiler, all threads of one rank",
        "spans": spans,
    }


def _draw(data: Data) -> Any:
    figure, axes = pyplot().subplots(figsize=(10, 3.2), layout="constrained")
    labelled = set()
    for span in data["spans"]:
        name = span["name"]
        if name == "backward":
            axes.axvline(span["start_ms"], color="black", linewidth=1, linestyle=":")
            axes.text(span["start_ms"], -0.62, " backward", fontsize=9, va="center")
            continue
        label = None if name in labelled else _NAMES[name]
        labelled.add(name)
        height = _LANES.index(span["lane"])
        axes.barh(
            height, span["ms"], left=span["start_ms"], height=0.7, color=_COLOURS[name], label=label, edgecolor="white"
        )
    axes.set_yticks(range(len(_LANES)), _LANES)
    axes.set_ylim(len(_LANES) - 0.5, -0.85)
    axes.grid(axis="y", visible=False)
    axes.set(
        xlabel="ms",
        title=f"rank {data['rank']} of {data['hosts']} on emulated hosts, {in_words(data['rate'])} each, {data['exchange']}\n"
        f"{data['shape']}",
    )
    figure.legend(fontsize=9, ncols=5, loc="outside lower center")
    return figure


FIGURE = FigureMaker(_measure, _draw)
