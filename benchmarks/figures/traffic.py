"""Bytes that a rank sends for a layer against the length of the sequence: flat for states, growing for tokens."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks import methods
from benchmarks.figures.common import Data, FigureMaker, lengths_on_axis, pyplot, style
from benchmarks.harness import run_ranks
from longspan.exchange import TOPOLOGIES
from longspan.plan import Problem, gpu_cluster
from longspan.state import Identity

_TOPOLOGIES = {
    "LASP-2 (all_gather)": "all_gather",
    "LASP (ring)": "ring",
    "LASP, receiving first": "ring",
    "ZeCO (pipelined)": "pipelined",
    "all_to_all": "all_to_all",
}
_LONGEST = 2**22


def _counted(lengths: list[int]) -> dict[str, list[int]]:
    return {
        name: [methods.traffic(name, length, torch.bfloat16).bytes_sent for length in lengths]
        for name in methods.METHODS
    }


def _measure(quick: bool) -> Data:
    num_ranks = 4
    # The counter is exact and no clock is read: local ranks and short sequences do.
    lengths = [64, 128] if quick else [256, 512, 1024]
    by_rank = run_ranks(num_ranks, _counted, lengths)
    most = {
        name: [max(counts) for counts in zip(*(rank[name] for rank in by_rank), strict=True)]
        for name in methods.METHODS
    }
    problem = Problem(num_ranks, methods.HEADS, methods.SIZE, methods.SIZE, Identity)
    cluster = gpu_cluster(num_ranks)
    formula = {name: TOPOLOGIES[topology]().cost(problem, cluster).bytes_sent for name, topology in _TOPOLOGIES.items()}
    for name, num_bytes in formula.items():
        if any(counted != num_bytes for counted in most[name]):
            raise SystemExit(f"{name} sends {most[name]} bytes where its formula says {num_bytes}; no figure is drawn")
    growing = {name: counts for name, counts in most.items() if name not in formula}
    for name, counts in growing.items():
        if any(count * lengths[0] != counts[0] * length for count, length in zip(counts, lengths, strict=True)):
            raise SystemExit(f"{name} sends {counts} bytes at {lengths} tokens: not in proportion; no figure is drawn")
    return {
        "ranks": num_ranks,
        "shape": f"B1 H{methods.HEADS} D{methods.SIZE} bfloat16, forward + backward; the rank that sends most",
        "lengths": lengths,
        "counted_bytes": most,
        "formula_bytes": formula,
        "bytes_a_token": {name: counts[0] / lengths[0] for name, counts in growing.items()},
        "longest_by_formula": _LONGEST,
    }


def _draw(data: Data) -> Any:
    figure, axes = pyplot().subplots(figsize=(7.5, 4.8), layout="constrained")
    ends = [data["lengths"][0], data["longest_by_formula"]]
    for name, counts in data["counted_bytes"].items():
        look = style(name)
        axes.plot(data["lengths"], [count / 2**20 for count in counts], label=name, **(look | {"linestyle": "none"}))
        by_formula = [data["formula_bytes"].get(name) or data["bytes_a_token"][name] * length for length in ends]
        axes.plot(ends, [number / 2**20 for number in by_formula], color=look["color"], linewidth=1.2)
    ticks = [ends[0]]
    while ticks[-1] < ends[1]:
        ticks.append(ticks[-1] * 4)
    lengths_on_axis(axes, ticks)
    axes.set_yscale("log")
    axes.set(
        xlabel="tokens of the sequence",
        ylabel="MiB sent by a rank for one layer",
        title=f"{data['ranks']} ranks, {data['shape']}\n"
        "markers: counted; lines: by formula (states), in proportion to the length (tokens)",
    )
    axes.legend(fontsize=9)
    return figure


FIGURE = FigureMaker(_measure, _draw)
