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
        and `inter`). It decides on chains, on steps of an all-gather and on all-to-alls, each as fast as its slowest link allows;
        where ranks of a node share their links, as long as `sharing` says when all send at once.
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
        return [
            self.hop_seconds(rank, own if (rank + 1) % self.ranks_per_node else num_bytes)
            for rank in range(self.num_ranks - 1)
        ]

    def hop_seconds(self, place: int, num_bytes: float, at_once: bool = False) -> float:
        """Seconds of a message between the rank at a place and the next, the slower way; `at_once`: while all ranks send."""
        if self.links is not None:
            ways = (place, place + 1), (place + 1, place)
            # What a rank takes to pass a message on was measured with a fold, over a link of the slowest kind.
            passing = 0.0 if self.hop is None else max(0.0, self.hop - self.slowest.latency - self.fold_latency)
            return passing + max(self.links.seconds(*way, num_bytes) for way in ways)
        if (place + 1) % self.ranks_per_node:
            return self.intra.seconds(num_bytes, at_once)
        # One rank of each node sends out of it.
        return self.inter.seconds(num_bytes, at_once and self.ranks_per_node == 1)

    def along(self, hops: Sequence[float], num_messages: int) -> float:
        """Seconds of messages one after the other, given those of each hop.

        In zigzag order a chain takes each hop there and back. Of a chain that documents cut, the slowest hops are counted.
        """
        rounds, rest = divmod(num_messages, len(hops))
        return rounds * sum(hops) + sum(sorted(hops)[len(hops) - rest :])

    def _each_to_all(self, members: Sequence[int], num_bytes: float) -> float:
        """Seconds until each of some ranks has sent so many bytes to each other one of them, by the matrix of links.

        One after another, and the longest way of a message.
        """
        assert self.links is not None
        latency, bandwidth = self.links.latency, self.links.bandwidth
        return max(
            max(latency[rank][other] for other in members if other != rank)
            + sum(num_bytes / bandwidth[rank][other] for other in members if other != rank)
            for rank in members
        )

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
            return self.along(hops, num_messages) + folds * self.fold(size, at_once=False)
        inside = num_messages - between_nodes
        own = num_bytes if bytes_inside is None else bytes_inside
        seconds = inside * self.intra.seconds(own) + between_nodes * self.inter.seconds(num_bytes)
        seconds += folds * self.fold(size, at_once=False)
        if self.hop is not None:
            links = inside * self.intra.latency + between_nodes * self.inter.latency + folds * self.fold_latency
            seconds += num_messages * self.hop - links
        return seconds

    def pace(self, place: int, num_bytes: float, size: tuple[float, float]) -> float:
        """`follow` for the blocks that one hop lets through, sent on by all ranks at once and folded."""
        carried = self.hop_seconds(place, num_bytes, at_once=True) - self.hop_seconds(place, 0.0, at_once=True)
        return self._between_blocks(carried + self.fold(size, at_once=True))

    def follow(self, num_bytes: float, size: tuple[float, float], bytes_inside: float | None = None) -> float:
        """Seconds by which blocks of a chain follow each other, each sent on by all ranks at once and folded."""
        carried = self.to_next(num_bytes, bytes_inside=bytes_inside) - self.to_next(0.0)
        return self._between_blocks(carried + self.fold(size, at_once=True))

    def _between_blocks(self, seconds: float) -> float:
        """Seconds from block to block that take so long to be carried and folded: with a gap, or with what was measured."""
        if self.block is not None:
            return self.block + seconds - self.fold((0.0, 0.0), at_once=True)
        return self.slowest.gap + seconds

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
            return self._each_to_all(range(self.num_ranks), num_bytes / (self.num_ranks - 1))
        inside, outside, others = self.ranks_per_node - 1, self.num_ranks - self.ranks_per_node, self.num_ranks - 1
        return max(
            self.intra.seconds(num_bytes * inside / others, True, inside) if inside else 0.0,
            self.inter.seconds(num_bytes * outside / others, True, outside) if outside else 0.0,
        )

    def all_to_all_inside(self, num_bytes: float) -> float:
        """`all_to_all` for the ranks of each node among themselves; nodes have several."""
        size = self.ranks_per_node
        if self.links is None:
            return self.intra.seconds(num_bytes, True, size - 1)
        part = num_bytes * self.intra.sharing / (size - 1)
        return max(self._each_to_all(range(first, first + size), part) for first in range(0, self.num_ranks, size))

    def all_to_all_of_rails(self, num_bytes: float) -> float:
        """`all_to_all` for the ranks of the same place in all of several nodes among themselves, for all places at once."""
        nodes, size = self.num_nodes, self.ranks_per_node
        if self.links is None:
            return self.inter.seconds(num_bytes, True, nodes - 1)
        part = num_bytes * self.inter.sharing / (nodes - 1)
        return max(self._each_to_all(range(place, self.num_ranks, size), part) for place in range(size))

    def coding(self, size: tuple[float, float], at_once: bool) -> float:
        """Seconds to encode and decode states of `Problem.coding_size`; `at_once`: all ranks do."""
        starts, num_bytes = size
        alone = starts * self.fold_latency + num_bytes / self.fold_bandwidth
        return alone * (self.fold_sharing if at_once else 1.0)

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
