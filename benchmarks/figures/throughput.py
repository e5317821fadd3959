"""Tokens a second against the length of the sequence, for ways to split attention over four hosts; as a figure and as a table."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from benchmarks import methods
from benchmarks.cluster import Cluster
from benchmarks.figures.common import Data, FigureMaker, in_words, lengths_on_axis, pyplot, style
from benchmarks.harness import Table, paired

_LONGEST_STEP = 15.0


def measure(quick: bool) -> Data:
    """Seconds of forward + backward by method and length."""
    lengths = [512, 1024] if quick else [2**power for power in range(11, 17)]
    hosts, rate = 4, "1gbit"
    with Cluster(hosts, rate) as cluster:
        taken = cluster.call(methods.times_by_length, lengths, torch.float32, 1 if quick else 3, _LONGEST_STEP)[0]
    return {
        "hosts": hosts,
        "rate": rate,
        "shape": f"B1 H{methods.HEADS} D{methods.SIZE} float32, forward + backward",
        "left_out": f"a method is left out where a step would take more than about {_LONGEST_STEP:g} s",
        "seconds": {
            name: {str(length): times[name] for length, times in taken.items() if name in times}
            for name in methods.METHODS
        },
    }


def table(data: Data) -> Table:
    """What `measure` found, with LASP-2 over each method, from times taken in turn."""
    made = Table(
        "sequence_parallel",
        f"LASP-2 over other methods, {data['hosts']} hosts, {in_words(data['rate'])}, {data['shape']}",
        "faster than LASP and Ring Attention (whole models of arXiv 2502.07563 on 64 GPUs at 2,048K tokens: 1.15 and 1.37 times)",
        ["tokens", "method", "ms", "tokens/s", "LASP-2 is so many times as fast"],
    )
    first, *_ = methods.LINEAR
    for length, lasp2 in data["seconds"][first].items():
        for name, by_length in data["seconds"].items():
            if length in by_length:
                result = paired(by_length[length], lasp2)
                tokens_a_second = int(length) / result.first
                made.add(f"{int(length):,}", name, f"{result.first * 1e3:.0f}", f"{tokens_a_second:,.0f}", result.ratio)
    return made


def _draw(data: Data) -> Any:
    figure, axes = pyplot().subplots(figsize=(9.5, 4.8), layout="constrained")
    lengths = sorted({int(length) for times in data["seconds"].values() for length in times})
    for name, by_length in data["seconds"].items():
        own = sorted(int(length) for length in by_length)
        rates = [sorted(length / seconds for seconds in by_length[str(length)]) for length in own]
        middle = [statistics.median(rate) for rate in rates]
        spread = [
            [m - rate[0] for m, rate in zip(middle, rates, strict=True)],
            [rate[-1] - m for m, rate in zip(middle, rates, strict=True)],
        ]
        axes.errorbar(own, middle, yerr=spread, capsize=2, label=name, **style(name))
    lengths_on_axis(axes, lengths)
    axes.set_yscale("log")
    axes.set(
        xlabel=f"tokens of the sequence; a line ends where the next step might take more than {_LONGEST_STEP:g} s",
        ylabel="tokens per second, forward + backward",
        title=f"{data['hosts']} emulated hosts on one machine, {in_words(data['rate'])} each\n{data['shape']}",
    )
    figure.legend(fontsize=9, loc="outside right upper")
    return figure


FIGURE = FigureMaker(measure, _draw, table)
