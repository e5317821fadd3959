"""The loss by position of a model that was trained on sequences of a million tokens."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks import million
from benchmarks.figures.common import Data, FigureMaker, pyplot
from benchmarks.harness import Table


def table(data: Data) -> Table:
    """What the run took, and its losses."""
    made = Table(
        "million",
        f"longspan train on {data['tokens']:,} tokens a step in segments of {data['segment_tokens']:,}, two ranks, {data['shape']}",
        "one command on one machine; the loss falls",
        ["steps", "first loss", "last loss", "s a step", "MiB of a rank at most"],
    )
    losses = data["losses"]
    seconds, peak = statistics.median(data["seconds"]), data["peak_bytes"] / 2**20
    made.add(len(losses), f"{losses[0]:.3f}", f"{losses[-1]:.3f}", f"{seconds:.1f}", f"{peak:,.0f}")
    return made


def _draw(data: Data) -> Any:
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
    left.plot(range(1, len(data["losses"]) + 1), data["losses"], "o-", color="#0072B2")
    left.set(xlabel="step", ylabel="loss of a token, nats", title=f"Training on {data['tokens']:,} tokens a step")
    middles = [(part["first"] + part["stop"]) / 2 for part in data["by_position"]]
    right.plot(middles, [part["nats"] for part in data["by_position"]], "o-", color="#D55E00")
    right.set(xlabel="tokens before", ylabel="loss of a token, nats", title="By position, held-out text")
    right.set_xscale("log", base=2)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure


FIGURE = FigureMaker(million.measure, _draw, table)
