"""`uneven_links`: exchanges on an emulated cluster with one slow link, ranks in the order as given, and by measured links.

And a ring whose hops are coded one by one, as the cost model says for an error of 5 %.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.cluster import Cluster
from benchmarks.harness import Table, say
from longspan import SequenceLayout
from longspan.exchange import TOPOLOGIES, Ring, measured_links
from longspan.exchange.auto.hops import cheapest_codecs
from longspan.exchange.auto.timing import RankClock
from longspan.exchange.auto.trial import exchange_seconds
from longspan.exchange.codec import codecs_within
from longspan.exchange.problem import problem_of
from longspan.plan import LinkMatrix, chain_order, stated_cluster
from longspan.state import Pair, ScalarDecay

_STATES = (16, 128, 128)
_RATE, _SLOW_RATE = "1gbit", "50mbit"
# Hosts, ranks of each, and the two hosts with the slow link: neighbours in the order as given.
_CLUSTERS = ((4, 1, (1, 2)), (6, 1, (2, 3)), (3, 2, (0, 1)))
# No further round begins after so long.
_MOST_SECONDS = 60.0
_NAMES = ("ring", "ring coded by hop", "pipelined", "all_gather", "all_to_all", "two_level")
_BOUND = 0.05


def _on_rank(ranks_per_node: int, orders: tuple[str, ...], rounds: int) -> dict[str, Any]:
    """Seconds of an exchange by layout order, rank order and topology; and the order that follows from measured links."""
    num_ranks = dist.get_world_size()
    device = torch.device("cpu")
    links = measured_links(SequenceLayout(num_ranks), device)
    num_bytes = 4 * _STATES[0] * _STATES[1] * _STATES[2]
    ordered = chain_order(links, num_bytes, ranks_per_node)
    names = [name for name in _NAMES if name != "two_level" or 1 < ranks_per_node < num_ranks]
    sides: dict[tuple[str, str, str], tuple[RankClock, Pair, Any]] = {}
    for order in orders:
        for way, rank_order in (("given", tuple(range(num_ranks))), ("measured", ordered)):
            layout = SequenceLayout(
                64 * num_ranks,
                order=order,  # type: ignore[arg-type]
                ranks_per_node=ranks_per_node,
                rank_order=rank_order,
            )
            shape = (layout.num_segments, 1, *_STATES)
            random = torch.Generator().manual_seed(dist.get_rank())
            decay = -torch.rand(ScalarDecay.parameter_shape(shape), generator=random)
            pair = Pair(ScalarDecay(decay), torch.randn(shape, generator=random))
            for name in names:
                topology = _coded(pair, layout, links) if name == "ring coded by hop" else TOPOLOGIES[name]()
                sides[order, way, name] = RankClock(layout, device), pair, topology.resolve(pair, layout)
    times: dict[tuple[str, str, str], list[float]] = {side: [] for side in sides}
    begun = time.perf_counter()
    for ranks, pair, carrier in sides.values():
        # Its first exchange makes groups and connections; one value column is enough for that.
        narrow = Pair(pair.transition, pair.state[..., :1].contiguous())
        exchange_seconds(carrier, narrow, narrow.state, ranks)
    for number in range(rounds):
        for side, (ranks, pair, carrier) in sides.items():
            times[side].append(sum(exchange_seconds(carrier, pair, pair.state, ranks)))
        # All ranks stop alike.
        (elapsed,) = ranks.largest([time.perf_counter() - begun])
        if dist.get_rank() == 0:
            say(f"uneven_links: {num_ranks} ranks, round {number + 1} of {rounds}, {elapsed:.0f} s")
        if elapsed > _MOST_SECONDS:
            break
    slowest = min(links.bandwidth[one][other] for one in range(num_ranks) for other in range(num_ranks) if one != other)
    return {"times": times, "order": ordered, "slowest": slowest, "names": names}


def _coded(pair: Pair, layout: SequenceLayout, links: LinkMatrix) -> Ring:
    """A ring that sends over each link what is fastest over it and keeps to `_BOUND`."""
    # Beside the links, the figures of a CPU: how fast it codes.
    cluster = replace(stated_cluster("cpu", layout.num_ranks, layout.ranks_per_node or 1), links=links)
    codecs = [None, *codecs_within(_BOUND)]
    problem = problem_of(pair, layout, None)
    return Ring(codec_of_hops=cheapest_codecs(problem, cluster.in_order(layout.rank_order), codecs))


def uneven_links(quick: bool) -> Table:
    table = Table(
        "uneven_links",
        f"One exchange with nothing to hide it, forward + backward, B1 H16 K = V = 128, emulated hosts at {_RATE} of which two "
        f"send each other {_SLOW_RATE}: ranks as given over ranks in the order of measured links; float32, but for the ring whose "
        f"hops are coded as the cost model says for an error of {_BOUND:.0%}",
        "a chain in the order of measured links does not pass the slow one; what every rank sends to every other must",
        [
            "ranks",
            "slow link",
            "order",
            "slowest link as measured, MB/s",
            "ranks by measured links",
            *(f"ms, {name}: as given / ordered" for name in _NAMES),
        ],
    )
    orders = ("contiguous",) if quick else ("contiguous", "zigzag")
    for hosts, per_host, (one, other) in _CLUSTERS[:1] if quick else _CLUSTERS:
        with Cluster(hosts, _RATE, per_host, (one, other, _SLOW_RATE)) as cluster:
            found = cluster.call(_on_rank, per_host, orders, 1 if quick else 5)[0]
        for order in orders:
            cells = []
            for name in _NAMES:
                if name not in found["names"]:
                    cells.append("")
                    continue
                given, ordered = (
                    statistics.median(found["times"][order, way, name]) * 1e3 for way in ("given", "measured")
                )
                cells.append(f"{given:,.1f} / {ordered:,.1f} ({given / ordered:.2f})")
            table.add(
                f"{hosts * per_host} on {hosts} hosts",
                f"hosts {one} and {other}",
                order,
                f"{found['slowest'] / 1e6:.1f}",
                " ".join(map(str, found["order"])),
                *cells,
            )
    return table


TABLES: dict[str, Callable[[bool], Table]] = {"uneven_links": uneven_links}
