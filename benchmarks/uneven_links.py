"""`uneven_links`: exchanges on an emulated cluster with one slow link, ranks in the order as given, and by measured links."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.cluster import Cluster
from benchmarks.harness import Table
from longspan import SequenceLayout
from longspan.exchange import TOPOLOGIES, measured_links
from longspan.exchange.auto.timing import RankClock
from longspan.exchange.auto.trial import exchange_seconds
from longspan.plan import chain_order
from longspan.state import Pair, ScalarDecay

_STATES = (16, 128, 128)
_RATE, _SLOW_RATE = "1gbit", "50mbit"
# Hosts, ranks of each, and the two hosts with the slow link: neighbours in the order as given.
_CLUSTERS = ((4, 1, (1, 2)), (6, 1, (2, 3)), (3, 2, (0, 1)))
_NAMES = ("ring", "pipelined", "all_gather", "all_to_all", "two_level")


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
                carrier = TOPOLOGIES[name]().resolve(pair, layout)
                sides[order, way, name] = RankClock(layout, device), pair, carrier
    times: dict[tuple[str, str, str], list[float]] = {side: [] for side in sides}
    for number in range(rounds + 1):
        for side, (ranks, pair, carrier) in sides.items():
            seconds = sum(exchange_seconds(carrier, pair, pair.state, ranks))
            if number:
                times[side].append(seconds)
    slowest = min(links.bandwidth[one][other] for one in range(num_ranks) for other in range(num_ranks) if one != other)
    return {"times": times, "order": ordered, "slowest": slowest, "names": names}


def uneven_links(quick: bool) -> Table:
    table = Table(
        "uneven_links",
        f"One exchange with nothing to hide it, forward + backward, B1 H16 K = V = 128, emulated hosts at {_RATE} of which two "
        f"send each other {_SLOW_RATE}: ranks as given over ranks in the order of measured links",
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
