"""What lies between every two ranks, and in which order a chain of states passes fastest through them: arithmetic alone.

A chain passes P − 1 messages from one rank to the next, forward, and backward as many the other way. Its time is the sum of theirs:
the fastest order is the shortest path that visits every rank once, with the time of a message each way as the distance. It is found
exactly for few ranks (Held and Karp, 1962), and for many by improving the path that always takes the nearest rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf, isfinite
from typing import Any

from longspan.errors import InputError

Distance = Callable[[int, int], float]
_MOST_EXACT = 10
"""Ranks up to which the shortest path is found exactly: 2^P · P² steps."""


@dataclass(frozen=True)
class LinkMatrix:
    """Latency, in seconds, and bandwidth, in bytes a second, of a message from each rank (row) to each other (column).

    Numbers from a rank to itself are not looked at.

    Raises:
        InputError: for rows that make no square of two ranks or more, and numbers that are none of a link.
    """

    latency: tuple[tuple[float, ...], ...]
    bandwidth: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        for name, rows in (("latency", self.latency), ("bandwidth", self.bandwidth)):
            made = tuple(tuple(float(number) for number in row) for row in rows)
            object.__setattr__(self, name, made)
            if len(made) < 2 or any(len(row) != len(made) for row in made):
                raise InputError(
                    f"a LinkMatrix has a row and a column for each of two ranks or more; got rows of {[len(row) for row in made]} "
                    f"numbers as {name}. Give one number for each pair of ranks"
                )
            for source, row in enumerate(made):
                for target, number in enumerate(row):
                    fits = isfinite(number) and (number >= 0 if name == "latency" else number > 0)
                    if source != target and not fits:
                        least = "of at least 0" if name == "latency" else "above 0"
                        raise InputError(
                            f"the {name} from rank {source} to rank {target} must be a finite number {least}; got {number!r}. Give "
                            + ("seconds" if name == "latency" else "bytes a second")
                        )
        if len(self.latency) != len(self.bandwidth):
            raise InputError(
                f"a LinkMatrix has as many ranks in latency as in bandwidth; got {len(self.latency)} and {len(self.bandwidth)}. "
                "Give both for the same ranks"
            )

    @property
    def num_ranks(self) -> int:
        return len(self.latency)

    def seconds(self, source: int, target: int, num_bytes: float) -> float:
        """Seconds of a message."""
        return self.latency[source][target] + num_bytes / self.bandwidth[source][target]

    def in_order(self, rank_order: Sequence[int]) -> LinkMatrix:
        """The same links with ranks numbered anew: the i-th is `rank_order[i]` of before."""
        latency, bandwidth = (
            tuple(tuple(rows[source][target] for target in rank_order) for source in rank_order)
            for rows in (self.latency, self.bandwidth)
        )
        return LinkMatrix(latency, bandwidth)

    def chain_seconds(self, rank_order: Sequence[int], num_bytes: float) -> float:
        """Seconds of a chain of messages through the ranks, there and back."""
        return sum(
            self.seconds(source, target, num_bytes) + self.seconds(target, source, num_bytes)
            for source, target in pairwise(rank_order)
        )

    def as_json(self) -> dict[str, Any]:
        """What `from_json` takes."""
        return {"latency": [list(row) for row in self.latency], "bandwidth": [list(row) for row in self.bandwidth]}

    @classmethod
    def from_json(cls, record: Any) -> LinkMatrix:
        """The matrix that `as_json` wrote; raises InputError, KeyError, TypeError or ValueError for another record."""
        return cls(tuple(map(tuple, record["latency"])), tuple(map(tuple, record["bandwidth"])))

    def __str__(self) -> str:
        rows = [
            " ".join("-" if source == target else f"{number / 1e6:,.1f}" for target, number in enumerate(row))
            for source, row in enumerate(self.bandwidth)
        ]
        return "MB/s from rank to rank: " + "; ".join(f"{source}: {row}" for source, row in enumerate(rows))


def chain_order(links: LinkMatrix, num_bytes: float, ranks_per_node: int = 1) -> tuple[int, ...]:
    """The order of ranks in which a chain of messages passes fastest through all of them, as `SequenceLayout` takes `rank_order`.

    Of two orders that are as fast, the one of lower ranks first; so an order and its reverse begin with the lower end.

    Args:
        links: of all ranks.
        num_bytes: of a message, that is, of a layer's states.
        ranks_per_node: how many consecutive ranks share a node: these stay together, so that a chain leaves each node once, and the
            topology `two_level` finds its nodes. The nodes are ordered by the fastest links between them, and their ranks inside.

    Raises:
        InputError: for ranks that make no such nodes.
    """
    if ranks_per_node < 1 or links.num_ranks % ranks_per_node:
        raise InputError(
            f"{links.num_ranks} ranks do not make nodes of {ranks_per_node}: give a divisor, or leave ranks_per_node out"
        )

    def distance(source: int, target: int) -> float:
        return links.seconds(source, target, num_bytes) + links.seconds(target, source, num_bytes)

    nodes = [tuple(range(first, first + ranks_per_node)) for first in range(0, links.num_ranks, ranks_per_node)]
    if ranks_per_node == 1:
        return _shortest_path(links.num_ranks, distance)

    def between(one: int, other: int) -> float:
        return min(distance(source, target) for source in nodes[one] for target in nodes[other])

    order: list[int] = []
    for place in (path := _shortest_path(len(nodes), between)):
        following = path.index(place) + 1
        rest = nodes[path[following]] if following < len(path) else None
        order += _through_node(nodes[place], order[-1] if order else None, rest, distance)
    return tuple(order)


def _through_node(
    ranks: Sequence[int], before: int | None, after: Sequence[int] | None, distance: Distance
) -> list[int]:
    """The ranks of a node, from the one nearest to the rank before to one that is near to the next node."""

    def ends(source: int, target: int) -> float:
        entering = 0.0 if before is None else distance(before, source)
        leaving = 0.0 if after is None else min(distance(target, other) for other in after)
        return entering + leaving

    best, shortest = list(ranks), inf
    for first in range(len(ranks)):
        for last in range(len(ranks)):
            if (first == last) != (len(ranks) == 1):
                continue
            path = _shortest_path(
                len(ranks), lambda one, other: distance(ranks[one], ranks[other]), first=first, last=last
            )
            length = sum(distance(ranks[one], ranks[other]) for one, other in pairwise(path))
            length += ends(ranks[first], ranks[last])
            if length < shortest:
                best, shortest = [ranks[place] for place in path], length
    return best


def _shortest_path(size: int, distance: Distance, first: int | None = None, last: int | None = None) -> tuple[int, ...]:
    """Of all paths through 0 … size − 1 the shortest, or for many a short one; of equals the lowest numbers first."""
    if size == 1:
        return (0,)
    exact = size <= _MOST_EXACT
    found = (_exact_path if exact else _improved_path)(size, distance, first, last)
    if first is None and last is None and found[0] > found[-1]:
        found = found[::-1]
    return found


def _exact_path(size: int, distance: Distance, first: int | None, last: int | None) -> tuple[int, ...]:
    # Held and Karp: the shortest path through each set of places that ends at each of them.
    best: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {
        (1 << place, place): (0.0, (place,)) for place in range(size) if first in (None, place)
    }
    for _ in range(size - 1):
        longer: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {}
        for (visited, at), (length, path) in best.items():
            for following in range(size):
                if visited >> following & 1:
                    continue
                key = visited | 1 << following, following
                candidate = length + distance(at, following), (*path, following)
                if key not in longer or candidate < longer[key]:
                    longer[key] = candidate
        best = longer
    return min(value for (_, at), value in best.items() if last in (None, at))[1]


def _improved_path(size: int, distance: Distance, first: int | None, last: int | None) -> tuple[int, ...]:
    def length(path: Sequence[int]) -> float:
        return sum(distance(one, other) for one, other in pairwise(path))

    paths = [
        _nearest_first(size, distance, start, last)
        for start in (range(size) if first is None else [first])
        if start != last
    ]
    path = min(paths, key=lambda each: (length(each), each))
    improved = True
    while improved:
        improved = False
        # Turn a stretch around where that makes the path shorter.
        low, high = (0 if first is None else 1), (size if last is None else size - 1)
        for start in range(low, high - 1):
            for stop in range(start + 2, high + 1):
                turned = [*path[:start], *reversed(path[start:stop]), *path[stop:]]
                if length(turned) < length(path) * (1 - 1e-12):
                    path, improved = turned, True
    return tuple(path)


def _nearest_first(size: int, distance: Distance, start: int, last: int | None) -> list[int]:
    path, left = [start], set(range(size)) - {start, last}
    while left:
        nearest = min(left, key=lambda place: (distance(path[-1], place), place))
        path.append(nearest)
        left.remove(nearest)
    return path if last is None else [*path, last]
