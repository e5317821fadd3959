"""The measured cluster: the same on every rank, measured once, right for links whose speed is known, and not counted as traffic."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from dataclasses import astuple
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from longspan.comm.collectives import all_gather_single
from longspan.exchange import record_traffic
from longspan.exchange.auto import calibration, timing
from longspan.exchange.auto.figures import figures_of
from longspan.layout import SequenceLayout
from longspan.plan import Cluster
from longspan.state import Dense, Pair, exclusive_scan
from tests.ranks import run_on_ranks

CPU = torch.device("cpu")


def fresh_layout(**options: Any) -> SequenceLayout:
    """On a process group for which nothing has been measured."""
    group = dist.new_group(list(range(dist.get_world_size())))
    return SequenceLayout(64, group=group, **options)


def measure_twice(ranks_per_node: int | None) -> tuple[Cluster, bool, int, int, list[str]]:
    """The cluster, whether a second call returns the same object, collectives counted, operations of the second call, log lines."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("longspan")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    layout = fresh_layout(ranks_per_node=ranks_per_node)
    try:
        with record_traffic() as traffic:
            cluster = figures_of(layout, CPU).cluster
        lines_of_first = list(lines)
        again = figures_of(SequenceLayout(99, group=layout.group, ranks_per_node=ranks_per_node), CPU).cluster
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return cluster, again is cluster, traffic.num_collectives, len(lines) - len(lines_of_first), lines_of_first


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^3-1$")
@pytest.mark.parametrize(("num_ranks", "ranks_per_node"), [(2, None), (3, 1), (4, 2)])
def test_all_ranks_have_the_same_figures_measured_once_and_not_counted(
    num_ranks: int, ranks_per_node: int | None
) -> None:
    by_rank = run_on_ranks(num_ranks, measure_twice, ranks_per_node)
    clusters = [cluster for cluster, *_ in by_rank]
    assert all(cluster == clusters[0] for cluster in clusters)
    assert clusters[0].num_ranks == num_ranks
    # Without a word from the layout, the ranks of a test share a host.
    assert clusters[0].ranks_per_node == (ranks_per_node or num_ranks)
    assert clusters[0].gather is not None and clusters[0].swap is not None
    assert clusters[0].hop is not None and clusters[0].block is not None
    for rank, (_, is_same, counted, logged_again, lines) in enumerate(by_rank):
        assert is_same and counted == 0 and logged_again == 0
        # Every rank says what it makes for itself, and one of them what all of them do.
        assert sum(" makes a process group " in line for line in lines) == 4
        assert sum(line.startswith("a thread begins") for line in lines) == 1
        of_measurement = [line for line in lines if line.startswith("measure")]
        assert len(of_measurement) == (2 if rank == 0 else 0) and len(lines) == 5 + len(of_measurement)
    begins, ended = [line for line in by_rank[0][-1] if line.startswith("measure")]
    assert begins.startswith("measures the links of ")
    assert ended.startswith("measured the ranks in ") and ended.endswith(str(clusters[0]))


# A known network in place of the clock: how long a call takes follows from what it sends and folds.
LATENCY, GAP, BANDWIDTH, SHARING = 0.25, 0.125, 2.0**20, 4.0
STEP, STEP_BANDWIDTH = 0.5, 2.0**18
HOP, BLOCK = 0.75, 0.375
FOLD, FOLD_BANDWIDTH, MATMUL_RATE = 2.0**-12, 2.0**30, 2.0**34


class KnownNetwork:
    """torch.distributed with a clock of its own, which every operation moves on by the time it would take; words take no bytes."""

    def __init__(self) -> None:
        self.clock = 0.0
        self._sent: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)

    def isend(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._sent.append(x.nbytes if x.numel() > 1 else 0)
        return dist.isend(x, *args, **kwargs)

    def recv(self, *args: Any, **kwargs: Any) -> Any:
        if self._sent:
            # The answer to what has been sent.
            self.clock += 2 * LATENCY + (len(self._sent) - 1) * GAP + sum(self._sent) / BANDWIDTH
            self._sent.clear()
        return dist.recv(*args, **kwargs)

    def P2POp(self, operation: Any, *args: Any, **kwargs: Any) -> Any:
        return dist.P2POp(dist.isend if operation == self.isend else operation, *args, **kwargs)

    def batch_isend_irecv(self, operations: list[Any]) -> Any:
        self.clock += LATENCY + operations[0].tensor.nbytes * SHARING / BANDWIDTH
        return dist.batch_isend_irecv(operations)

    def all_gather(self, out: Tensor, own: Tensor, group: Any) -> None:
        steps = dist.get_world_size(group) - 1
        self.clock += steps * (STEP + (own.nbytes if own.numel() > 1 else 0) / STEP_BANDWIDTH)
        all_gather_single(out, own, group)

    def all_to_all_single(self, received: Tensor, sent: Tensor, group: Any) -> None:
        size = dist.get_world_size(group)
        to_others = sent.nbytes * (size - 1) / size if sent.numel() > size else 0
        self.clock += 2 * STEP + to_others / STEP_BANDWIDTH
        dist.all_to_all_single(received, sent, group=group)

    def scan(self, pair: Pair) -> Tensor:
        state = pair.state[0]
        num_bytes = state.nbytes if state.numel() > 16 else 0
        flops = 2 * state.numel() * state.shape[-2] if isinstance(pair.transition, Dense) else 0
        folds = len(pair.state) - 1
        self.clock += folds * (FOLD + num_bytes / FOLD_BANDWIDTH + flops / MATMUL_RATE)
        return exclusive_scan(pair)

    def chain(self, name: str, state_dtype: None, num_blocks: int) -> Any:
        """Something to start and to wait for, in place of a chain of that many blocks."""
        hops = dist.get_world_size() - 1

        class Passing:
            def start(_, pair: Pair, layout: SequenceLayout) -> Any:  # noqa: N805
                return _

            def wait(_) -> None:  # noqa: N805
                self.clock += hops * HOP + (num_blocks - 1) * BLOCK

        return Passing()

    def time(self, function: Callable[[], object]) -> float:
        begun = self.clock
        function()
        return self.clock - begun


def cluster_of_a_known_network() -> Cluster:
    network = KnownNetwork()
    layout = fresh_layout(ranks_per_node=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "dist", network)
        patch.setattr(calibration, "all_gather_single", network.all_gather)
        patch.setattr(calibration, "exclusive_scan", network.scan)
        patch.setattr(timing.RankClock, "one", lambda _, function: network.time(function))
        patch.setattr(calibration, "Chain", network.chain)
        return figures_of(layout, CPU).cluster


def test_a_network_of_known_speed_is_measured_as_it_is() -> None:
    (cluster, *_) = run_on_ranks(4, cluster_of_a_known_network)
    for link in (cluster.intra, cluster.inter):
        assert astuple(link) == pytest.approx((LATENCY, BANDWIDTH, GAP, SHARING))
    assert cluster.gather is not None and cluster.swap is not None
    assert astuple(cluster.gather) == pytest.approx((STEP, STEP_BANDWIDTH, 0.0, 1.0), rel=1e-3)
    assert astuple(cluster.swap) == pytest.approx((2 * STEP, STEP_BANDWIDTH, 0.0, 1.0), rel=1e-3)
    assert (cluster.hop, cluster.block) == pytest.approx((HOP, BLOCK))
    assert cluster.fold_latency == pytest.approx(FOLD)
    assert cluster.fold_bandwidth == pytest.approx(FOLD_BANDWIDTH)
    assert cluster.matmul_rate == pytest.approx(MATMUL_RATE)
    assert cluster.fold_sharing == 1.0


def cluster_of_unequal_hosts() -> Cluster:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: "one" if dist.get_rank() == 0 else "two")
        return figures_of(fresh_layout(), CPU).cluster


def test_hosts_of_unequal_numbers_of_ranks_count_as_nodes_of_one() -> None:
    for cluster in run_on_ranks(3, cluster_of_unequal_hosts):
        assert (cluster.num_nodes, cluster.ranks_per_node) == (3, 1)
