"""Memory of a step against the length of its sequence: in one piece and in segments of time, alone and over two ranks."""

from __future__ import annotations

from typing import Any

from benchmarks import stream
from benchmarks.figures.common import Data, FigureMaker, pyplot

_COLOURS = {1: "#0072B2", 2: "#D55E00"}
_STYLES = {"in one piece": "--", "in segments": "-"}


def _draw(data: Data) -> Any:
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
    for side, ranks in dict.fromkeys((found["side"], found["ranks"]) for found in data["sides"]):
        own = [found for found in data["sides"] if (found["side"], found["ranks"]) == (side, ranks)]
        tokens = [found["tokens"] for found in own]
        label = f"{side}, {'one process' if ranks == 1 else f'{ranks} ranks'}"
        look = {"color": _COLOURS[ranks], "linestyle": _STYLES[side], "marker": "o", "label": label}
        left.plot(tokens, [found["bytes"] / 2**20 for found in own], **look)
        right.plot(tokens, [found["seconds"] / found["tokens"] * 1e6 for found in own], **look)
    left.set(xlabel="tokens of the sequence", ylabel="MiB of a rank", title="Above model, gradients and optimizer")
    right.set(xlabel="tokens of the sequence", ylabel="ms for 1,000 tokens", title="Time of a step", ylim=(0, None))
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
    left.set_ylim(0, None)
    left.legend(loc="center right")
    return figure


FIGURE = FigureMaker(stream.measure, _draw, stream.table_of)
