"""The loss by position of a model that was trained on sequences of a million tokens."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks import million
from benchmarks.figures.common import Data, FigureMaker, pyplot
from benchmarks.harness import Table

_COLOURS = ("#0072B2", "#D55E00")


def table(data: Data) -> Table:
    """What the run took, and its losses."""
    made = Table(
        "million",
        f"longspan train on {data['tokens']:,} tokens a step in segments of {data['segment_tokens']:,}, two ranks, {data['shape']}",
        "one command on one machine; the loss falls",
        [
            "steps",
            "first loss",
            "last loss",
            "s a step",
            "tokens/s",
            "MiB of a rank at most",
            "held-out loss before",
            "held-out loss",
        ],
    )
    losses = data["losses"]
    seconds, peak = statistics.median(data["seconds"]), data["peak_bytes"] / 2**20
    held_out = [f"{mean_loss(parts):.3f}" for parts in data["by_position"].values()]
    rate = f"{data['tokens'] / seconds:,.0f}"
    made.add(len(losses), f"{losses[0]:.3f}", f"{losses[-1]:.3f}", f"{seconds:.1f}", rate, f"{peak:,.0f}", *held_out)
    return made


def mean_loss(parts: list[dict[str, float]]) -> float:
    """Of all tokens, from the means of the parts."""
    return sum((part["stop"] - part["first"]) * part["nats"] for part in parts) / parts[-1]["stop"]


def _draw(data: Data) -> Any:
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
    before, losses = data["losses_before"], data["losses"]
    shown = {"color": _COLOURS[0], "label": f"{data['tokens_before']:,} tokens a step"}
    left.plot(range(1, 1 + len(before)), before, **shown)
    shown = {"color": _COLOURS[1], "marker": "o", "label": f"{data['tokens']:,} tokens a step"}
    left.plot(range(1 + len(before), 1 + len(before) + len(losses)), losses, **shown)
    left.set(xlabel="step", ylabel="loss of a token, nats", title="Training")
    for colour, (name, parts) in zip(_COLOURS, data["by_position"].items(), strict=True):
        middles = [(part["first"] + part["stop"]) / 2 for part in parts]
        right.plot(middles, [part["nats"] for part in parts], "o-", color=colour, markersize=4, label=name)
    right.set(xlabel="tokens before", ylabel="loss of a token, nats", title="By position, held-out text")
    right.set_xscale("log", base=2)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


FIGURE = FigureMaker(million.measure, _draw, table)
