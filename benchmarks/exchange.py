"""The exchange of states on emulated hosts: links, every topology, the waiting that a layer sees, and against other methods."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import exposed
from benchmarks.cluster import Cluster
from benchmarks.figures import throughput
from benchmarks.harness import Table, in_subprocess, paired
from benchmarks.network import bits_per_second
from longspan.commands.bench_exchange import measure
from longspan.commands.bench_options import BenchExchange
from longspan.commands.bench_report import BenchFigures

RATES = ("1gbit", "100mbit")
HEADS, SIZE = 16, 128
TOPOLOGIES = ("all_gather", "ring", "pipelined", "all_to_all", "two_level")
# What is exchanged, each with what it adds to the topologies: decays after which nothing is left of a state let neighbour hold.
PROBLEMS: dict[str, tuple[str, ...]] = {
    "simple_gla": (),
    "gated_delta_rule": (),
    "retention that forgets within a segment": ("neighbour",),
}
# Turns of a run, and runs: fewer where an exchange takes seconds.
TURNS = {"1gbit": (3, 5), "100mbit": (2, 3)}
# Hosts and ranks a host.
CLUSTERS = ((4, 1), (8, 1), (4, 2))


def _ranks(hosts: int, per_host: int) -> str:
    return f"{hosts * per_host} on {hosts} hosts"


def _link(num_bytes: int, repeats: int) -> tuple[list[float], list[float]]:
    """Seconds of messages of 4 bytes there and back, halved, and of `num_bytes` one way, between two ranks."""
    rank = dist.get_rank()
    word, message = torch.zeros(1), torch.zeros(num_bytes // 4)
    words: list[float] = []
    messages: list[float] = []
    for _ in range(repeats + 1):
        for x, taken in ((word, words), (message, messages)):
            dist.barrier()
            begun = time.perf_counter()
            for sender in (0, 1):
                y = x if sender == 0 else word
                if rank == sender:
                    dist.send(y, 1 - rank)
                else:
                    dist.recv(y, 1 - rank)
            taken.append(time.perf_counter() - begun)
    latencies = [seconds / 2 for seconds in words[1:]]
    latency = statistics.median(latencies)
    return latencies, [seconds - latency for seconds in messages[1:]]


def links(quick: bool) -> Table:
    table = Table(
        "cluster_links",
        "Links of the emulated cluster: gloo messages from one host to another",
        "long messages within 10 % of the rate",
        ["rate", "µs, 4 bytes", "MiB", "ms", "Mbit/s", "of the rate"],
    )
    for rate in RATES:
        bits = bits_per_second(rate)
        for mebibytes in (1, 4) if quick else (1, 4, 16):
            with Cluster(2, rate) as cluster:
                latencies, times = cluster.call(_link, mebibytes * 2**20, 3 if quick else 9)[0]
            shares = sorted(8 * mebibytes * 2**20 / seconds / bits for seconds in times)
            share = statistics.median(shares)
            table.add(
                rate,
                f"{statistics.median(latencies) * 1e6:.0f}",
                mebibytes,
                f"{statistics.median(times) * 1e3:.1f}",
                f"{share * bits / 1e6:.0f}",
                f"{share:.2f} ({shares[0]:.2f}-{shares[-1]:.2f})",
            )
    return table


def _measure(options: BenchExchange, runs: int) -> list[BenchFigures]:
    options.check(dist.get_world_size())
    return [measure(options, torch.device("cpu")) for _ in range(runs)]


def _seconds(figures: BenchFigures) -> dict[str, float]:
    return {row.topology: row.seconds for row in figures.rows}


def _options(problem: str, repeats: int) -> BenchExchange:
    return BenchExchange(
        operator=problem.partition(" ")[0],
        heads=HEADS,
        key_size=SIZE,
        value_size=SIZE,
        topologies=(*TOPOLOGIES, *PROBLEMS[problem], "auto"),
        log_decay=-200.0 if PROBLEMS[problem] else None,
        repeats=repeats,
    )


def exchange(rate: str, quick: bool) -> Table:
    table = Table(
        "exchange",
        f"One exchange with nothing to hide it, {rate}, forward + backward, B1 H{HEADS} K = V = {SIZE}, emulated hosts",
        "auto within 10 % of the best topology; the best never behind all_gather, and ahead of it by what the model says",
        [
            "ranks",
            "operator",
            *(f"ms, {name}" for name in (*TOPOLOGIES, "neighbour")),
            "auto takes",
            "auto / best",
            "best / all_gather",
            "modelled",
        ],
    )
    for hosts, per_host in CLUSTERS[::2] if quick else CLUSTERS:
        with Cluster(hosts, rate, per_host) as cluster:
            for problem in list(PROBLEMS)[::2] if quick else PROBLEMS:
                # Each topology in each of a few runs of a few turns, so that there is a spread to show.
                repeats, num_runs = (2, 2) if quick else TURNS[rate]
                runs: list[BenchFigures] = cluster.call(_measure, _options(problem, repeats), num_runs)[0]
                _add_cell(table, _ranks(hosts, per_host), problem, runs)
    return table


def _add_cell(table: Table, ranks: str, problem: str, runs: Sequence[BenchFigures]) -> None:
    taken = [_seconds(figures) for figures in runs]
    medians = {name: statistics.median(run[name] for run in taken) for name in taken[0] if name != "auto"}
    best = min(medians, key=lambda name: medians[name])
    auto = paired([run["auto"] for run in taken], [run[best] for run in taken])
    ahead = paired([run[best] for run in taken], [run["all_gather"] for run in taken])
    modelled = {row.topology: row.modelled.seconds for row in runs[0].rows}
    table.add(
        ranks,
        problem,
        *(f"{medians[name] * 1e3:.1f}" if name in medians else "" for name in (*TOPOLOGIES, "neighbour")),
        runs[-1].choice,
        auto.ratio,
        f"{best}: {ahead.ratio}",
        f"{modelled[best] / modelled['all_gather']:.2f}",
    )


SIDES: list[exposed.Side] = [("auto", False), ("all_gather", False), ("ring", False), ("all_gather", True)]
# Two ranks: all topologies send the same, and each step takes long.
REAL_SIDES: list[exposed.Side] = [("auto", False), ("all_gather", False), ("all_gather", True)]


def _exposed_row(seconds: exposed.Exposed) -> list[str]:
    milliseconds = (seconds.forward, seconds.exposed_forward, seconds.backward, seconds.exposed_backward)
    return [*(f"{value * 1e3:.1f}" for value in milliseconds), f"{seconds.share:.2%}"]


def _name(side: exposed.Side) -> str:
    return f"{side[0]}, blocking" if side[1] else side[0]


def exposed_real(quick: bool) -> Table:
    """Two ranks, so that each has a core of its own."""
    tokens = 1024 if quick else 65536
    table = Table(
        "exposed",
        f"Waiting in a layer at {tokens:,} tokens on two emulated hosts, width {exposed.WIDTH}, H{exposed.HEADS} D{exposed.SIZE}",
        "less than 5 % of the layer's time; blocking: the layer waits as soon as it has started",
        ["rate", "exchange", "ms forward", "waiting", "ms backward", "waiting", "share"],
    )
    for rate in RATES:
        with Cluster(2, rate) as cluster:
            taken: dict[Any, exposed.Exposed] = cluster.call(exposed.real, tokens // 2, REAL_SIDES, 1 if quick else 3)[
                0
            ]
        for side, seconds in taken.items():
            table.add(rate, _name(side), *_exposed_row(seconds))
    return table


def exposed_paced(quick: bool) -> Table:
    """More ranks than cores: computation is replaced by the time it takes alone."""
    tokens = 2048 if quick else 65536
    table = Table(
        "exposed_ranks",
        f"What the exchange adds to a layer at {tokens:,} tokens, each rank as if it had a core of its own",
        "less than 5 % of the layer's time; computation is replaced by the time it takes one process alone, the exchange is real",
        ["rate", "ranks", "exchange", "ms forward", "exposed", "ms backward", "exposed", "share"],
    )
    for num_ranks in (4,) if quick else (4, 8):
        taken = in_subprocess(exposed.stretches, tokens // num_ranks, 1 if quick else 3)
        for rate in RATES:
            with Cluster(num_ranks, rate) as cluster:
                results: dict[Any, exposed.Exposed] = cluster.call(exposed.paced, taken, SIDES, 1 if quick else 3)[0]
            for side, seconds in results.items():
                table.add(rate, num_ranks, _name(side), *_exposed_row(seconds))
    return table


def sequence_parallel(quick: bool) -> Table:
    """What the figure `throughput` shows."""
    return throughput.table(throughput.measure(quick))


TABLES: dict[str, Callable[[bool], Table]] = {
    "cluster_links": links,
    "exchange": partial(exchange, "1gbit"),
    "exchange_100mbit": partial(exchange, "100mbit"),
    "exposed": exposed_real,
    "exposed_ranks": exposed_paced,
    "sequence_parallel": sequence_parallel,
}
