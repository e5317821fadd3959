"""What the figures share: colours, the raw data beside each figure, and how both are written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import Table, machine

Data = dict[str, Any]
"""What was measured, as JSON has it."""

# Okabe and Ito's palette, told apart with any colour vision; each with a marker of its own.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_STYLES = {
    "LASP-2 (all_gather)": 0,
    "all_gather": 0,
    "LASP (ring)": 1,
    "ring": 1,
    "LASP, receiving first": 5,
    "all_to_all": 2,
    "ZeCO (pipelined)": 3,
    "pipelined": 3,
    "head exchange (Ulysses)": 4,
    "two_level": 5,
    "Ring Attention (softmax)": 6,
    "auto": 6,
    "neighbour": 7,
}


@dataclass(frozen=True)
class FigureMaker:
    """How a figure comes about.

    measure: what the figure shows, as JSON; True for short and few measurements. draw: a matplotlib figure of it. table: a table of
    it, where there is one.
    """

    measure: Callable[[bool], Data]
    draw: Callable[[Data], Any]
    table: Callable[[Data], Table] | None = None


def style(name: str) -> dict[str, Any]:
    """Colour and marker of a method or topology: the same in every figure."""
    number = _STYLES[name]
    look = {"color": _COLOURS[number], "marker": _MARKERS[number], "markersize": 5, "linewidth": 1.5}
    # Open, and larger: it often falls on the ring's.
    return look | {"markersize": 9, "fillstyle": "none"} if name.endswith("pipelined") or "ZeCO" in name else look


def pyplot() -> Any:
    """matplotlib.pyplot, drawing to files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as loaded

    # The same data gives the same file.
    loaded.rcParams.update({"svg.hashsalt": "longspan", "font.size": 10, "axes.grid": True, "grid.alpha": 0.3})
    return loaded


def lengths_on_axis(axes: Any, lengths: Sequence[int]) -> None:
    """A logarithmic x axis whose ticks are these numbers of tokens or ranks."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(lengths), [_short(number) for number in lengths])
    axes.minorticks_off()


def _short(number: int) -> str:
    for power, letter in ((20, "M"), (10, "K")):
        if number >= 2**power and number % 2**power == 0:
            return f"{number // 2**power}{letter}"
    return f"{number:,}"


def in_words(rate: str) -> str:
    """A rate as tc writes it, for a reader: 1gbit is 1 Gbit/s."""
    return f"{rate[:-4]} {rate[-4].upper()}bit/s"


def with_origin(name: str, command: str, data: Data) -> Data:
    """The raw data with where it comes from."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {"figure": name, "command": command, "machine": machine(), "load_average": load, "data": data}


def write(name: str, record: Data, figure: Any, folder: Path) -> list[Path]:
    """Write NAME.json, NAME.svg and NAME.png."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{ending}" for ending in ("json", "svg", "png")]
    paths[0].write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    figure.savefig(paths[1], metadata={"Date": None})
    figure.savefig(paths[2], dpi=150)
    return paths
