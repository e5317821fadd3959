"""What the cost model knows of machines: links between ranks, and how fast a rank folds states.

Units: seconds, bytes per second, floating-point operations per second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite

from longspan.errors import InputError
from longspan.plan.links import LinkMatrix


@dataclass(frozen=True)
class Link:
    """A full-duplex way from one rank to another (the alpha-beta model, with a gap between messages as in LogGP).

    latency: seconds from the start of an empty message to its receipt.
    bandwidth: bytes per second of one sender while the others are silent.
    gap: seconds by which messages sent one after another follow each other at least.
    sharing: how many times as long the bytes take when all ranks of a node send at once; their number where they share one
        network card, 1 where each has its own.
    """

    latency: float
    bandwidth: float
    gap: float = 0.0
    sharing: float = 1.0

    def __post_init__(self) -> None:
        for name, least in (("latency", 0.0), ("gap", 0.0), ("sharing", 1.0)):
            value = getattr(self, name)
            if not (isfinite(value) and value >= least):
                raise InputError(f"a link's {name} must be a number of at least {least:g}; got {value!r}")
        if not (isfinite(self.bandwidth) and self.bandwidth > 0):
            raise InputError(f"a link's bandwidth must be more than 0 bytes per second; got {self.bandwidth!r}")

    def seconds(self, num_bytes: float, at_once: bool = False, num_messages: int = 1) -> float:
        """Seconds for `num_bytes` in `num_messages` that are sent one after another; `at_once`: all ranks of a node send."""
        sharing = self.sharing if at_once else 1.0
        return self.latency + (num_messages - 1) * self.gap + num_bytes * sharing / self.bandwidth

    def bytes_seconds(self, num_bytes: float) -> float:
        """Seconds that bytes take beside the latency, when all ranks of a node send at once."""
        return num_bytes * self.sharing / self.bandwidth

    def __str__(self) -> str:
        gap = f", gap {self.gap * 1e6:.0f} µs" if self.gap else ""
        shared = f" ({self.bandwidth / self.sharing / 1e6:,.0f} MB/s with all at once)" if self.sharing > 1 else ""
        return f"latency {self.latency * 1e6:.0f} µs{gap}, {self.bandwidth / 1e6:,.0f} MB/s{shared}"


@dataclass(frozen=True)
class Cluster:
    """`num_ranks` ranks on nodes of `ranks_per_node`, numbered node by node.

    intra: between two ranks of a node. inter: between two ranks of different nodes.
    fold_latency: seconds that one fold A · S + U takes however small the state is.
    fold_bandwidth: bytes of states that a rank folds per second, beside the products of a Dense transition.
    matmul_rate: floating-point operations per second of batched float32 products of K×K and K×V matrices.
    attention_rate: floating-point operations per second of a rank's softmax attention.
    fold_sharing: how many times as long a fold takes when all ranks fold at once; more than 1 where ranks share cores.
    rings: how many rings an all-gather runs side by side, each through a link of its own between nodes (NCCL: one a network card;
        gloo: one).
    gather: a step of an all-gather of all ranks, as measured; None takes the links. swap: an all-to-all of all ranks, its latency
        that of the whole, its bandwidth that of a rank's bytes for others; None takes the links.
    links: what lies between every two ranks, in the order in which they hold the sequence; None is the same between all (`intra`
        and `inter`). It decides on chains, on steps of an all-gather and on all-to-alls, each as fast as its slowest link allows.
    hop: seconds of one hop of a chain, message and fold, however small the state; block: by how much small blocks follow each other
        at least. As measured; None takes the links and fold_latency.

    Raises:
        InputError: for numbers that make no cluster.
    """

    num_ranks: int
    ranks_per_node: int
    intra: Link
    inter: Link
    fold_latency: float
    fold_bandwidth: float
    matmul_rate: float
    attention_rate: float = 45e9
    fold_sharing: float = 1.0
    rings: int = 1
    gather: Link | None = None
    swap: Link | None = None
    hop: float | None = None
    block: float | None = None
    links: LinkMatrix | None = None

    def __post_init__(self) -> None:
        if self.num_ranks < 1 or self.ranks_per_node < 1 or self.num_ranks % self.ranks_per_node:
            raise InputError(
                f"{self.num_ranks} ranks do not make nodes of {self.ranks_per_node} ranks each: "
                "give a number of ranks that the ranks of a node divide"
            )
        if self.links is not None and self.links.num_ranks != self.num_ranks:
            raise InputError(
                f"the links are those of {self.links.num_ranks} ranks, and the cluster has {self.num_ranks}: give the links of its "
                "ranks"
            )
        for name in ("fold_bandwidth", "matmul_rate", "attention_rate"):
            if not getattr(self, name) > 0:
                raise InputError(f"a cluster's {name} must be more than 0; got {getattr(self, name)!r}")
        for name, least in (("fold_latency", 0), ("fold_sharing", 1), ("rings", 1)):
            if not getattr(self, name) >= least:
                raise InputError(f"a cluster's {name} must be at least {least}; got {getattr(self, name)!r}")

    @property
    def slowest(self) -> Link:
        """Of the kinds of links that the ranks have."""
        return self.inter if self.num_nodes > 1 else self.intra

    @property
    def num_nodes(self) -> int:
        return self.num_ranks // self.ranks_per_node

    def with_ranks(self, num_ranks: int) -> Cluster:
        """The same machines with another number of ranks; fewer than a node holds are one node."""
        ranks_per_node = min(self.ranks_per_node, num_ranks)
        return replace(
            self,
            num_ranks=num_ranks,
            ranks_per_node=ranks_per_node,
            gather=None,
            swap=None,
            hop=None,
            block=None,
            links=None,
        )

    def in_order(self, rank_order: Sequence[int]) -> Cluster:
        """The same machines, whose links are numbered in the order in which ranks hold the sequence."""
        return self if self.links is None else replace(self, links=self.links.in_order(rank_order))

    def _hops(self, num_bytes: float, bytes_inside: float | None) -> list[float]:
        """Seconds of a message from each rank to the next, the slower way of the two."""
        assert self.links is not None
        own = num_bytes if bytes_inside is None else bytes_inside
        seconds = []
        for rank in range(self.num_ranks - 1):
            size = own if (rank + 1) % self.ranks_per_node else num_bytes
            seconds.append(max(self.links.seconds(rank, rank + 1, size), self.links.seconds(rank + 1, rank, size)))
        return seconds

    def _to_all(self, links: LinkMatrix, rank: int, num_bytes: float) -> float:
        """Seconds for a rank to send so many bytes to each other one: one after another, and the longest way of a message."""
        others = [other for other in range(self.num_ranks) if other != rank]
        latency = max(links.latency[rank][other] for other in others)
        return latency + sum(num_bytes / links.bandwidth[rank][other] for other in others)

    def hops(
        self,
        num_messages: int,
        between_nodes: int,
        num_bytes: float,
        folds: int,
        size: tuple[float, float],
        bytes_inside: float | None = None,
    ) -> float:
        """Seconds for a chain: messages from rank to next rank, one after the other, `between_nodes` of which leave their node.

        folds: how many states of `size`, as `fold` takes it, are folded on the way. bytes_inside: of a message inside a node, where
        it has others than `num_bytes`.
        """
        if self.links is not None:
            hops = self._hops(num_bytes, bytes_inside)
            # In zigzag order a chain takes each hop there and back. Of a chain that documents cut, the slowest hops.
            rounds, rest = divmod(num_messages, len(hops))
            return rounds * sum(hops) + sum(sorted(hops)[len(hops) - rest :]) + folds * self.fold(size, at_once=False)
        inside = num_messages - between_nodes
        own = num_bytes if bytes_inside is None else bytes_inside
        seconds = inside * self.intra.seconds(own) + between_nodes * self.inter.seconds(num_bytes)
        seconds += folds * self.fold(size, at_once=False)
        if self.hop is not None:
            links = inside * self.intra.latency + between_nodes * self.inter.latency + folds * self.fold_latency
            seconds += num_messages * self.hop - links
        return seconds

    def follow(self, num_bytes: float, size: tuple[float, float], bytes_inside: float | None = None) -> float:
        """Seconds by which blocks of a chain follow each other, each sent on by all ranks at once and folded."""
        fold = self.fold(size, at_once=True)
        carried = self.to_next(num_bytes, bytes_inside=bytes_inside) - self.to_next(0.0)
        if self.block is not None:
            return self.block + carried + fold - self.fold((0.0, 0.0), at_once=True)
        return (self.inter.gap if self.num_nodes > 1 else self.intra.gap) + carried + fold

    def to_next(self, num_bytes: float, num_messages: int = 1, bytes_inside: float | None = None) -> float:
        """Seconds for all ranks to send to the next rank at once; one rank of each node sends out of it."""
        if self.links is not None:
            gap = self.slowest.gap * (num_messages - 1)
            return gap + max(self._hops(num_bytes, bytes_inside))
        own = num_bytes if bytes_inside is None else bytes_inside
        inside = self.intra.seconds(own, True, num_messages) if self.ranks_per_node > 1 else 0.0
        outside = self.inter.seconds(num_bytes, self.ranks_per_node == 1, num_messages)
        return max(inside, outside) if self.num_nodes > 1 else inside

    def gather_step(self, num_bytes: float) -> float:
        """Seconds for one of the P − 1 steps of an all-gather of `num_bytes` a rank."""
        if self.gather is not None:
            return self.gather.seconds(num_bytes)
        if self.links is not None:
            last = self.num_ranks - 1
            return max(*self._hops(num_bytes, None), self.links.seconds(last, 0, num_bytes))
        inside = self.intra.seconds(num_bytes, True) if self.ranks_per_node > 1 else 0.0
        outside = self.inter.seconds(num_bytes / self.rings, self.ranks_per_node == 1)
        return max(inside, outside) if self.num_nodes > 1 else inside

    def all_to_all(self, num_bytes: float) -> float:
        """Seconds for all ranks to send `num_bytes` in equal parts to all other ranks at once."""
        if self.swap is not None:
            return self.swap.seconds(num_bytes)
        if self.links is not None:
            part = num_bytes / (self.num_ranks - 1)
            return max(self._to_all(self.links, rank, part) for rank in range(self.num_ranks))
        inside, outside, others = self.ranks_per_node - 1, self.num_ranks - self.ranks_per_node, self.num_ranks - 1
        return max(
            self.intra.seconds(num_bytes * inside / others, True, inside) if inside else 0.0,
            self.inter.seconds(num_bytes * outside / others, True, outside) if outside else 0.0,
        )

    def coding(self, num_bytes: float, at_once: bool) -> float:
        """Seconds to encode and decode states, as `Problem.coding_bytes` counts them; `at_once`: all ranks do."""
        return num_bytes / self.fold_bandwidth * (self.fold_sharing if at_once else 1.0)

    def fold(self, size: tuple[float, float], at_once: bool) -> float:
        """Seconds for one fold of (bytes of states, operations of matrix products); `at_once`: all ranks fold."""
        num_bytes, flops = size
        alone = self.fold_latency + num_bytes / self.fold_bandwidth + flops / self.matmul_rate
        return alone * (self.fold_sharing if at_once else 1.0)

    def __str__(self) -> str:
        nodes = "1 node" if self.num_nodes == 1 else f"{self.num_nodes} nodes of {self.ranks_per_node}"
        links = [f"inside a node: {self.intra}"] if self.ranks_per_node > 1 else []
        links += [f"between nodes: {self.inter}"] if self.num_nodes > 1 else []
        links += [f"a step of an all-gather: {self.gather}"] if self.gather is not None else []
        links += [f"an all-to-all: {self.swap}"] if self.swap is not None else []
        sharing = f" ({self.fold_sharing:.1f} times as long with all at once)" if self.fold_sharing > 1 else ""
        if self.hop is not None and self.block is not None:
            links.append(f"a hop of a chain: {self.hop * 1e6:.0f} µs, a block behind it: {self.block * 1e6:.0f} µs")
        return (
            f"{self.num_ranks} ranks on {nodes}; {'; '.join([*links, ''])}"
            f"a fold: {self.fold_latency * 1e6:.0f} µs, {self.fold_bandwidth / 1e6:,.0f} MB/s, "
            f"products {self.matmul_rate / 1e9:,.0f} GFLOP/s{sharing}"
        )


def gpu_cluster(num_ranks: int, ranks_per_node: int = 8) -> Cluster:
    """A cluster of round numbers for planning: nodes with a fast switch inside and one 400 Gbit/s card per rank between them.

    They are assumptions, not measurements; replace what is known better.
    """
    return Cluster(
        num_ranks,
        min(ranks_per_node, num_ranks),
        intra=Link(latency=5e-6, bandwidth=300e9, gap=2e-6),
        inter=Link(latency=15e-6, bandwidth=45e9, gap=2e-6),
        fold_latency=10e-6,
        fold_bandwidth=500e9,
        matmul_rate=20e12,
        attention_rate=400e12,
        rings=min(ranks_per_node, num_ranks),
    )


def stated_cluster(device_type: str, num_ranks: int, ranks_per_node: int) -> Cluster:
    """The figures that decide where nobody measured: the same for the same numbers of ranks, whatever the machine does.

    On CPUs the links are gloo's: inside a node as measured on loopback with two cores, between nodes an Ethernet of 1 Gbit/s. On
    GPUs they are those of `gpu_cluster`. A choice among topologies takes them; measure (``Auto(measure=True)``) where they are far
    from the machines at hand.
    """
    if device_type != "cpu":
        return gpu_cluster(num_ranks, ranks_per_node)
    return Cluster(
        num_ranks,
        ranks_per_node,
        intra=Link(latency=200e-6, bandwidth=1.5e9, gap=50e-6),
        inter=Link(latency=200e-6, bandwidth=120e6, gap=50e-6, sharing=float(ranks_per_node)),
        fold_latency=20e-6,
        fold_bandwidth=2.5e9,
        matmul_rate=40e9,
    )
