"""Exposed time of a layer's exchange against the number of ranks: measured on emulated hosts, modelled beyond.

Modelled twice: with what was measured of these very ranks, which share the machine's cores; and, up to thousands of ranks, with the
links alone, as on hosts with cores of their own.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch
import torch.distributed as dist

import longspan
from benchmarks import exposed
from benchmarks.cluster import Cluster
from benchmarks.figures.common import Data, FigureMaker, in_words, lengths_on_axis, pyplot, style
from benchmarks.harness import in_subprocess
from longspan.exchange import TOPOLOGIES
from longspan.exchange.auto.figures import figures_of
from longspan.ops.variants import VARIANTS
from longspan.plan import Cluster as Machines
from longspan.plan import Problem, gpu_cluster

_TOPOLOGIES = ("all_gather", "ring", "pipelined", "all_to_all")
_MOST_RANKS = 4096


def _calibrated() -> Machines:
    return figures_of(longspan.SequenceLayout(dist.get_world_size()), torch.device("cpu")).cluster


def _problem(num_ranks: int) -> Problem:
    return Problem(num_ranks, exposed.HEADS, exposed.SIZE, exposed.SIZE, VARIANTS[exposed.OPERATOR].transition)


def _measure(quick: bool) -> Data:
    # So few that a state's way takes longer than what could hide it, from a few ranks on.
    tokens, rate = (128, "1gbit") if quick else (512, "1gbit")
    measured_at = [2, 4] if quick else [2, 4, 8]
    taken = in_subprocess(exposed.stretches, tokens, 1 if quick else 3)
    measured: dict[str, dict[str, float]] = {name: {} for name in _TOPOLOGIES}
    calibrated: dict[str, dict[str, float]] = {name: {} for name in _TOPOLOGIES}
    for num_ranks in measured_at:
        with Cluster(num_ranks, rate) as cluster:
            sides = [(name, False) for name in _TOPOLOGIES]
            for (name, _), seconds in cluster.call(exposed.paced, taken, sides, 1 if quick else 3)[0].items():
                measured[name][str(num_ranks)] = seconds.exposed_forward + seconds.exposed_backward
                assert seconds.modelled_forward is not None and seconds.modelled_backward is not None
                calibrated[name][str(num_ranks)] = seconds.modelled_forward + seconds.modelled_backward
            machines: Machines = cluster.call(_calibrated)[0]
    # As on hosts that share no cores, like the computation.
    machines = replace(machines, fold_sharing=1.0)
    counts = [2**power for power in range(1, _MOST_RANKS.bit_length())]
    return {
        "rate": rate,
        "tokens_a_rank": tokens,
        "shape": f"{exposed.OPERATOR} B1 H{exposed.HEADS} K = V = {exposed.SIZE}",
        "computation": {"paced_by_seconds": asdict(taken)},
        "links": {"measured_at_ranks": measured_at[-1], "cluster": asdict(machines)},
        "measured_seconds": measured,
        "calibrated_seconds": calibrated,
        "modelled_seconds": {
            name: {str(ranks): _modelled(name, ranks, machines, taken) for ranks in counts} for name in _TOPOLOGIES
        },
        "gpus_modelled_seconds": {
            name: {str(ranks): TOPOLOGIES[name]().cost(_problem(ranks), gpu_cluster(ranks)).seconds for ranks in counts}
            for name in (*_TOPOLOGIES, "two_level", "neighbour")
        },
        "gpus_assumed": asdict(gpu_cluster(_MOST_RANKS)),
    }


def _modelled(name: str, num_ranks: int, machines: Machines, taken: exposed.Stretches) -> float:
    cost = TOPOLOGIES[name]().cost(_problem(num_ranks), machines.with_ranks(num_ranks))
    return cost.forward.exposed(taken.between) + cost.backward.exposed(taken.between_backward)


def _draw(data: Data) -> Any:
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    for name, by_ranks in data["modelled_seconds"].items():
        look = style(name)
        left.plot(*_points(by_ranks), color=look["color"], linewidth=1.2, linestyle="--")
        left.plot(*_points(data["calibrated_seconds"][name]), color=look["color"], linewidth=1.2)
        left.plot(*_points(data["measured_seconds"][name]), label=name, **(look | {"linestyle": "none"}))
    left.set(
        ylabel="ms exposed in a layer, forward + backward",
        title=f"hosts with {in_words(data['rate'])} each, {data['tokens_a_rank']:,} tokens per rank\n"
        "markers: measured, sharing two cores; lines: modelled for these\ndashed: modelled for hosts with cores of their own",
    )
    for name, by_ranks in data["gpus_modelled_seconds"].items():
        right.plot(*_points(by_ranks), label=name, **(style(name) | {"linestyle": "--", "markersize": 3}))
    nodes = data["gpus_assumed"]["ranks_per_node"]
    right.set(
        ylabel="ms of an exchange, forward + backward",
        title=f"modelled, with assumed figures: nodes of {nodes} GPUs,\n400 Gbit/s a GPU; nothing hides the exchange",
    )
    for axes in (left, right):
        lengths_on_axis(axes, [4**power for power in range(1, 7)])
        axes.set_xlabel("ranks")
        axes.legend(fontsize=9)
    # What is hidden whole is 0, which a logarithmic axis does not have.
    left.set_yscale("symlog", linthresh=1.0)
    left.set_ylim(bottom=0)
    right.set_yscale("log")
    figure.suptitle(data["shape"], fontsize=11)
    return figure


def _points(by_ranks: dict[str, float]) -> tuple[list[int], list[float]]:
    ranks = sorted(map(int, by_ranks))
    return ranks, [by_ranks[str(number)] * 1e3 for number in ranks]


FIGURE = FigureMaker(_measure, _draw)
