"""The loss of a training run on several meshes, and how far each step is from one process's."""

from __future__ import annotations

from typing import Any

from benchmarks import curves
from benchmarks.figures.common import Data, FigureMaker, pyplot
from benchmarks.harness import Table

_LOOKS: dict[str, dict[str, Any]] = {
    "1 process": {"color": "#000000", "linewidth": 5, "alpha": 0.25},
    "sequence 2": {"color": "#0072B2", "linewidth": 1.5, "linestyle": "-"},
    "sequence 4": {"color": "#D55E00", "linewidth": 1.5, "linestyle": "--"},
    "data 2 x sequence 2": {"color": "#009E73", "linewidth": 1.5, "linestyle": "-."},
    "sharded 2 x sequence 2": {"color": "#CC79A7", "linewidth": 1.5, "linestyle": ":"},
}


def measure(quick: bool) -> Data:
    """Losses by step of every mesh."""
    seq_len, steps = (128, 4) if quick else (512, 200)
    return {"seq_len": seq_len, "steps": steps, "shape": curves.SHAPE, "sides": curves.measure(seq_len, steps)}


def table(data: Data) -> Table:
    """The last losses, and how far a step is from one process at most."""
    made = Table(
        "curves",
        f"longspan train, {data['steps']} steps of 4 sequences of {data['seq_len']:,} tokens, {data['shape']}",
        f"the same losses on every mesh, to a relative {curves.TOLERANCE:.0e}",
        ["mesh", "dp_replicate x dp_shard x sp", "last loss", "largest relative difference of a loss"],
    )
    for side, one in data["sides"].items():
        mesh = " x ".join(map(str, one["mesh"]))
        made.add(side, mesh, f"{one['losses'][-1]:.6f}", f"{max(one['relative_differences']):.1e}")
    return made


def _draw(data: Data) -> Any:
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
    for side, one in data["sides"].items():
        steps = range(1, len(one["losses"]) + 1)
        left.plot(steps, one["losses"], label=side, **_LOOKS[side])
        if side != "1 process":
            # Steps that are equal have no place on this axis.
            shown = [(step, value) for step, value in zip(steps, one["relative_differences"], strict=True) if value]
            right.plot([step for step, _ in shown], [value for _, value in shown], label=side, **_LOOKS[side])
    left.set(xlabel="step", ylabel="loss of a token, nats", title=f"{data['steps']} steps on five meshes")
    left.legend()
    right.axhline(curves.TOLERANCE, color="#000000", linewidth=1)
    right.set(yscale="log", xlabel="step", title="Relative difference from one process")
    return figure


FIGURE = FigureMaker(measure, _draw, table)
