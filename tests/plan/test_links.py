"""Uneven links: the order of ranks in which a chain is fastest, and what the cost model makes of a matrix of links."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace
from typing import Any

import pytest

from longspan.errors import InputError
from longspan.exchange import AllGather, AllToAll, Pipelined, Ring, TwoLevel
from longspan.plan import Cluster, Link, LinkMatrix, Problem, chain_order
from longspan.state import ScalarDecay

LINK = Link(1e-4, 1e8, gap=1e-5)


def matrix(num_ranks: int, slow: dict[tuple[int, int], float], latency: float = 1e-4) -> LinkMatrix:
    """Links of 100 MB/s, but for some, each both ways."""
    rows = [[1e8] * num_ranks for _ in range(num_ranks)]
    for (one, other), bandwidth in slow.items():
        rows[one][other] = rows[other][one] = bandwidth
    return LinkMatrix(((latency,) * num_ranks,) * num_ranks, tuple(map(tuple, rows)))


def random_links(num_ranks: int, seed: int) -> LinkMatrix:
    rng = random.Random(seed)
    latency = tuple(tuple(10 ** rng.uniform(-5, -2) for _ in range(num_ranks)) for _ in range(num_ranks))
    return LinkMatrix(
        latency, tuple(tuple(10 ** rng.uniform(6, 9) for _ in range(num_ranks)) for _ in range(num_ranks))
    )


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 5, 6])
def test_the_order_is_that_of_the_fastest_chain(num_ranks: int) -> None:
    for seed in range(8):
        links = random_links(num_ranks, seed)
        best = min(links.chain_seconds(order, 1e6) for order in itertools.permutations(range(num_ranks)))
        order = chain_order(links, 1e6)
        assert sorted(order) == list(range(num_ranks)) and order[0] < order[-1]
        assert links.chain_seconds(order, 1e6) == pytest.approx(best, rel=1e-12)


def test_links_that_are_alike_leave_the_order_as_it_is() -> None:
    for num_ranks in (2, 5, 8, 16):
        assert chain_order(matrix(num_ranks, {}), 1e6) == tuple(range(num_ranks))


def test_a_slow_link_is_passed_by() -> None:
    links = matrix(4, {(1, 2): 1e6})
    order = chain_order(links, 1e6)
    assert all(set(pair) != {1, 2} for pair in itertools.pairwise(order))
    assert links.chain_seconds(order, 1e6) < 0.1 * links.chain_seconds((0, 1, 2, 3), 1e6)


def test_many_ranks_have_a_short_path() -> None:
    # A line of 24 ranks whose numbers are shuffled: neighbours on it are near each other, all others far.
    shuffled = list(range(24))
    random.Random(5).shuffle(shuffled)
    near = dict.fromkeys(itertools.pairwise(shuffled), 1000000000.0)
    links = matrix(24, near)
    order = chain_order(links, 1e7)
    assert list(order) in (shuffled, shuffled[::-1])


@pytest.mark.parametrize("seed", range(4))
def test_ranks_of_a_node_stay_together_and_nodes_are_in_the_best_order(seed: int) -> None:
    links = random_links(6, seed)
    order = chain_order(links, 1e5, ranks_per_node=2)
    assert all(order[first] // 2 == order[first + 1] // 2 for first in (0, 2, 4))
    of_nodes = [
        tuple(itertools.chain(*chosen))
        for nodes in itertools.permutations([(0, 1), (2, 3), (4, 5)])
        for chosen in itertools.product(*(((a, b), (b, a)) for a, b in nodes))
    ]
    seconds = [links.chain_seconds(each, 1e5) for each in of_nodes]
    # The best links between nodes decide on their order, one node after another: near the best, and no worse than the middle.
    assert links.chain_seconds(order, 1e5) <= sorted(seconds)[len(seconds) // 2]


def test_nodes_with_one_slow_link_between_them_are_not_neighbours() -> None:
    slow = {(one, other): 1e6 for one in (0, 1) for other in (2, 3)}
    order = chain_order(matrix(6, slow | {(0, 1): 1e9, (2, 3): 1e9, (4, 5): 1e9}), 1e6, ranks_per_node=2)
    assert [rank // 2 for rank in order[::2]] in ([0, 2, 1], [1, 2, 0])


def cluster(links: LinkMatrix | None, num_ranks: int = 4) -> Cluster:
    return Cluster(num_ranks, 1, LINK, LINK, 1e-5, 1e9, 1e9, links=links)


PROBLEM = Problem(4, 16, 64, 64, ScalarDecay)


@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("topology", [Ring(), Pipelined(num_blocks=4), AllGather()], ids=lambda each: each.name)
def test_equal_links_cost_what_one_link_does(topology: Any, segments: int) -> None:
    problem = Problem(4, 16, 64, 64, ScalarDecay, segments_per_rank=segments)
    alike = topology.cost(problem, cluster(matrix(4, {})))
    assert alike.seconds == pytest.approx(topology.cost(problem, cluster(None)).seconds, rel=1e-9)


def test_the_cost_of_a_chain_is_that_of_its_own_hops() -> None:
    links = matrix(4, {(1, 2): 1e6})
    given = Ring().cost(PROBLEM, cluster(links)).seconds
    ordered = Ring().cost(PROBLEM, cluster(links).in_order((0, 2, 3, 1))).seconds
    alike = Ring().cost(PROBLEM, cluster(matrix(4, {}))).seconds
    assert ordered == pytest.approx(alike)
    # One hop of the three there, and one back, at a hundredth of the rate.
    assert given - ordered == pytest.approx(2 * PROBLEM.state * (1 / 1e6 - 1 / 1e8))
    # All topologies that send over it are as slow, in whatever order.
    for topology in (AllGather(), AllToAll()):
        assert topology.cost(PROBLEM, cluster(links)).seconds > topology.cost(PROBLEM, cluster(matrix(4, {}))).seconds


def test_two_levels_count_links_inside_nodes_and_along_rails() -> None:
    def seconds(slow: dict[tuple[int, int], float]) -> float:
        return TwoLevel().cost(PROBLEM, replace(cluster(matrix(4, slow)), ranks_per_node=2)).seconds

    alike = seconds({})
    assert alike == pytest.approx(TwoLevel().cost(PROBLEM, replace(cluster(None), ranks_per_node=2)).seconds)
    assert seconds({(0, 1): 1e6}) > 2 * alike and seconds({(0, 2): 1e6}) > 2 * alike
    # Nobody sends from one place of a node to another place of another.
    assert seconds({(0, 3): 1e6}) == alike


def test_links_are_written_down_and_read_again() -> None:
    links = random_links(3, 1)
    assert LinkMatrix.from_json(links.as_json()) == links
    assert links.in_order((2, 0, 1)).in_order((1, 2, 0)) == links
    assert "MB/s from rank to rank: 0: - " in str(links)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinkMatrix(((0.0,),), ((1.0,),)), "a row and a column for each of two ranks or more"),
        (lambda: LinkMatrix(((0, 0), (0, 0)), ((1, 1), (1,))), r"got rows of \[2, 1\] numbers as bandwidth"),
        (
            lambda: LinkMatrix(((0, 0), (0, 0)), ((1, 0), (1, 1))),
            "bandwidth from rank 0 to rank 1 must be a finite number above 0",
        ),
        (
            lambda: LinkMatrix(((0, 0), (-1, 0)), ((1, 1), (1, 1))),
            "latency from rank 1 to rank 0 .* of at least 0; got -1.0. Give",
        ),
        (lambda: LinkMatrix(((0, math.nan), (0, 0)), ((1, 1), (1, 1))), "got nan"),
        (
            lambda: LinkMatrix(((0, 0), (0, 0)), ((1,) * 3,) * 3),
            "as many ranks in latency as in bandwidth; got 2 and 3",
        ),
        (lambda: chain_order(matrix(4, {}), 1e6, 3), "4 ranks do not make nodes of 3"),
        (lambda: cluster(matrix(3, {})), "links are those of 3 ranks, and the cluster has 4"),
    ],
)
def test_what_is_no_matrix_of_links_is_refused(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
