"""Fine-tuning by Trainer: the losses of two ranks on those of one process, and the memory that each process needs."""

from __future__ import annotations

from typing import Any

from benchmarks import finetune
from benchmarks.figures.common import Data, FigureMaker, pyplot
from benchmarks.harness import Table

_LOOKS = {
    "Transformers, 1 process": {"color": "#000000", "linewidth": 4, "alpha": 0.25},
    "longspan, 1 process": {"color": "#E69F00", "linewidth": 1.5, "linestyle": "-"},
    "longspan, 2 ranks": {"color": "#0072B2", "linewidth": 1.5, "linestyle": "--"},
}


def measure(quick: bool) -> Data:
    """Losses by step and peak memory by process."""
    length, steps = (256, 3) if quick else (2048, 24)
    return {
        "length": length,
        "steps": steps,
        "shape": finetune.SHAPE,
        "text": "sources of Python's standard library, bytes",
        "sides": finetune.measure(length, steps),
    }


def table(data: Data) -> Table:
    """The last losses, how far they are from one process, and memory."""
    made = Table(
        "finetune",
        f"Trainer, {data['steps']} steps of one sequence of {data['length']:,} tokens, {data['shape']}",
        "the same losses with less memory in each process",
        ["side", "last loss", "largest difference of a loss", "peak memory of a process, MiB"],
    )
    for side, one in data["sides"].items():
        peaks = ", ".join(f"{peak / 2**20:.0f}" for peak in one["peak_bytes"])
        made.add(side, f"{one['losses'][-1]:.4f}", f"{one['largest_relative_difference']:.1e}", peaks)
    return made


def _draw(data: Data) -> Any:
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(9.5, 3.8), layout="constrained", width_ratios=(3, 2))
    for side, one in data["sides"].items():
        left.plot(range(1, len(one["losses"]) + 1), one["losses"], label=side, **_LOOKS[side])
    left.set(xlabel="step", ylabel="loss of a byte, nats", title=f"Trainer, {data['length']:,} tokens of real text")
    left.legend()
    names = list(data["sides"])
    peaks = [max(data["sides"][side]["peak_bytes"]) / 2**20 for side in names]
    bars = right.barh(names, peaks, color=[_LOOKS[side]["color"] for side in names], alpha=0.8)
    right.bar_label(bars, fmt="%.0f", padding=3)
    right.margins(x=0.15)
    right.invert_yaxis()
    right.set(xlabel="MiB beyond the start of training", title="Peak memory of a process")
    right.grid(False, axis="y")
    return figure


FIGURE = FigureMaker(measure, _draw, table)
