"""Ranks that hold the sequence in another order than that of their numbers: every layer gives what it gives in theirs."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import longspan
from longspan.attention.softmax import SoftmaxMethod
from longspan.comm.groups import forget
from longspan.errors import LayoutError
from longspan.exchange import TOPOLOGIES, Auto, measured_links, measured_rank_order
from longspan.exchange.auto.calibration import take_links
from longspan.layout import Order, SequenceLayout, group_of
from longspan.plan import Cluster, Link, LinkMatrix, chain_order
from longspan.state import ScalarDecay
from tests.attention import test_bidirectional, test_convolution, test_long_convolution, test_selective_scan
from tests.attention.long_convolution_reference import KINDS
from tests.attention.softmax_reference import Case, compare
from tests.attention.test_conformance import PACKINGS, assert_right, packings_of, worst_on_rank
from tests.attention.test_softmax import PACKED
from tests.compare import worst
from tests.exchange.scan import errors_of_scan
from tests.exchange.test_auto import own_pair
from tests.models import test_decoding
from tests.ranks import raised, run_on_ranks
from tests.uneven import with_order, with_weights

ORDERS: tuple[Order, ...] = ("contiguous", "zigzag")
RANKS = {3: (2, 0, 1), 4: (2, 3, 1, 0)}


def on_ranks(num_ranks: int, function: Any, *arguments: Any) -> list[Any]:
    return run_on_ranks(num_ranks, with_order, RANKS[num_ranks], function, *arguments)


def segments(order: Order) -> tuple[tuple[int, int], ...]:
    return SequenceLayout(12, order=order).segments


def test_the_suites_below_see_another_order() -> None:
    assert on_ranks(3, segments, "contiguous") == [((4, 8),), ((8, 12),), ((0, 4),)]
    assert on_ranks(3, segments, "zigzag") == [((2, 4), (8, 10)), ((4, 6), (6, 8)), ((0, 2), (10, 12))]


# A chain, and what finds segments in the order of ranks by itself.
@pytest.mark.slow_rows(r"^3-simple_gla-(pipelined|neighbour|auto)$", r"^3-gated_delta_rule-(?!all_to_all$)")
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^3-simple_gla-(two_level|all_gather)$")
@pytest.mark.parametrize("exchange", [*TOPOLOGIES, "auto"])
@pytest.mark.parametrize("name", ["simple_gla", "gated_delta_rule"])
@pytest.mark.parametrize("num_ranks", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_every_topology_equals_the_recurrent_form(name: str, exchange: str, num_ranks: int) -> None:
    # Hosts of tests have one name: a single node, which stays together in any order.
    cases = [(order, packing, 43, "fused") for order in ORDERS for packing in packings_of(exchange)]
    assert_right(on_ranks(num_ranks, worst_on_rank, name, exchange, cases))


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^(all_gather|ring)$")
@pytest.mark.parametrize("method", ["all_gather", "ring", "ulysses"])
def test_every_softmax_method_equals_dense_attention(method: SoftmaxMethod) -> None:
    cases = [
        Case(53, method, order, causal, window, documents, heads=(12, 4), dim=4)
        for order, causal, window, documents in itertools.product(ORDERS, (True, False), (None, 7), (None, PACKED))
    ]
    for rank, answers in enumerate(on_ranks(3, compare, cases)):
        for case, errors in zip(cases, answers, strict=True):
            assert worst(errors) <= 1e-11, (rank, case, errors)


@pytest.mark.parametrize("order", ORDERS)
def test_convolutions_and_bidirectional_layers_equal_their_definitions(order: Order) -> None:
    for documents in (None, [0, 3, 5, 30, 43]):
        for errors in on_ranks(3, test_convolution.errors_on_rank, 43, 4, documents, order):
            assert worst(errors) < 1e-11, (documents, errors)
        for errors in on_ranks(3, test_bidirectional.errors_on_rank, "retention", order, 43, documents, 1):
            assert worst(errors) < 1e-10, (documents, errors)


def test_the_selective_scan_equals_its_recurrence() -> None:
    cases = [(order, packing, 43, "softplus") for order in ORDERS for packing in PACKINGS]
    assert_right(on_ranks(3, test_selective_scan.worst_on_rank, "ring", cases))


# Of taps the halo, which goes to the next run, and the all-to-all, behind which tokens are brought into the sequence's order.
@pytest.mark.slow_rows(r"^(function|complex exponentials)")
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^taps$")
@pytest.mark.parametrize("kind", KINDS)
def test_long_convolutions_equal_their_definition(kind: str) -> None:
    for order, documents_number in zip(ORDERS, (1, 0), strict=True):
        options = {"with_states": True}
        for error, what in on_ranks(3, test_long_convolution.worst_error, kind, order, documents_number, options):
            assert error < 1e-11, what


# In the order of the ranks it runs in make test, in `tests/models/test_decoding.py`.
@pytest.mark.slow
def test_a_prompt_over_ranks_is_remembered_as_by_one() -> None:
    for found in on_ranks(3, test_decoding.differences_of_all, "gla"):
        for what, (error, same) in found.items():
            assert error < 1e-11 and same, (what, error)


def ordered_nodes(exchange: str, rank_order: list[int], weights: list[float] | None) -> float:
    errors = []
    for order in ORDERS:
        layout = SequenceLayout(40, order=order, ranks_per_node=2, rank_order=rank_order, weights=weights)
        errors += errors_of_scan(longspan.exchange.exchange_named(exchange), ScalarDecay, (1, 3, 4, 4), layout)
    return worst(errors)


def test_two_levels_take_nodes_in_any_order_and_refuse_those_that_are_torn() -> None:
    for weights in (None, [1.0, 2.0, 0.0, 1.0]):
        for error in run_on_ranks(4, ordered_nodes, "two_level", [3, 2, 0, 1], weights):
            assert error < 1e-12
    for kind, message in run_on_ranks(4, raised, ordered_nodes, "two_level", [0, 2, 1, 3], None):
        assert kind == "LayoutError"
        assert "got nodes of 2 ranks and rank_order [0, 2, 1, 3]. Order whole nodes" in message
    # A choice passes it by.
    assert worst(run_on_ranks(4, ordered_nodes, "auto", [0, 2, 1, 3], None)) < 1e-12


def test_weights_belong_to_ranks_and_not_to_places() -> None:
    layouts = [SequenceLayout.for_rank(20, 3, rank, weights=[1, 2, 1], rank_order=[1, 2, 0]) for rank in range(3)]
    assert [layout.segments for layout in layouts] == [((15, 20),), ((0, 10),), ((10, 15),)]
    assert [layout.num_local_tokens for layout in layouts] == [5, 10, 5] == list(layouts[0].tokens_of)
    assert layouts[1].mirrored.segments == ((10, 20),)
    for errors in run_on_ranks(3, with_weights, (1.0, 0.5, 2.5), ordered_here):
        assert errors < 1e-12


def ordered_here() -> float:
    layout = SequenceLayout(40, order="zigzag", rank_order=[1, 2, 0])
    return worst(errors_of_scan(longspan.exchange.Ring(), ScalarDecay, (1, 2, 4, 4), layout))


@pytest.mark.parametrize("rank_order", [[0, 1], [0, 1, 1], [1, 2, 3], [0.0, 1.0, 2.0], "012", 3, [True, 0, 2]])
def test_what_is_no_order_of_all_ranks_is_refused(rank_order: Any) -> None:
    with pytest.raises(LayoutError, match=r"rank_order must hold each of the ranks 0 to 2 once.* got .*Take what"):
        SequenceLayout.for_rank(16, 3, 0, rank_order=rank_order)


def differ() -> tuple[str, str]:
    return raised(SequenceLayout(16, rank_order=[0, 1] if SequenceLayout(16).rank else [1, 0]).verify)


def test_ranks_with_another_order_are_found() -> None:
    for kind, message in run_on_ranks(2, differ):
        assert kind == "LayoutError" and "rank_order: rank 0 has (1, 0), rank 1 has (0, 1)" in message


def links_here() -> LinkMatrix:
    layout = SequenceLayout(3)
    try:
        assert sorted(measured_rank_order(layout)) == [0, 1, 2]
        return measured_links(layout)
    finally:
        forget(group_of(layout), lambda key: key == ("links", "cpu"))


def test_every_rank_measures_the_same_links() -> None:
    first, *others = run_on_ranks(3, links_here)
    assert all(links == first for links in others) and first.num_ranks == 3
    assert all(first.seconds(one, other, 1e6) > 0 for one, other in itertools.permutations(range(3), 2))
    assert sorted(chain_order(first, 1e6)) == [0, 1, 2]


def chosen(rank_order: list[int]) -> float:
    """Seconds that auto counts for a chain whose link between ranks 1 and 2 is slow."""
    layout = SequenceLayout(64, rank_order=rank_order)
    fast, slow = Link(1e-5, 1e9), 1e4
    rows = [[slow if {one, other} == {1, 2} else 1e9 for other in range(3)] for one in range(3)]
    links = LinkMatrix(((1e-5,) * 3,) * 3, tuple(map(tuple, rows)))
    auto = Auto(cluster=Cluster(3, 1, fast, fast, 1e-6, 1e9, 1e9, links=links))
    priced = auto.priced(own_pair(ScalarDecay, layout), layout)
    return next(each.seconds for each in priced if each.topology.name == "ring")


def counted_as_measured(rank_order: list[int]) -> tuple[float, float]:
    """Seconds that auto counts for a chain on measured ranks, before and after their links are known, one of which is slow."""
    layout = SequenceLayout(64, rank_order=rank_order)
    rows = [[1e2 if {one, other} == {1, 2} else 1e9 for other in range(3)] for one in range(3)]
    links = LinkMatrix(((1e-5,) * 3,) * 3, tuple(map(tuple, rows)))
    seconds = []
    for known in (None, links):
        if known is not None:
            take_links(layout, torch.device("cpu"), known)
        priced = Auto(measure=True).priced(own_pair(ScalarDecay, layout), layout)
        seconds.append(next(each.seconds for each in priced if each.topology.name == "ring"))
    # The ranks of tests keep their group.
    forget(group_of(layout), lambda key: key == ("links", "cpu"))
    return seconds[0], seconds[1]


def test_measured_figures_count_links_one_by_one_once_they_are_known() -> None:
    for before, after in run_on_ranks(3, counted_as_measured, [0, 1, 2]):
        assert after > before + 1.0
    for before, after in run_on_ranks(3, counted_as_measured, [1, 0, 2]):
        assert after < before + 0.1


def test_the_model_takes_links_in_the_order_of_the_layout() -> None:
    (given, *_), (ordered, *_) = run_on_ranks(3, chosen, [0, 1, 2]), run_on_ranks(3, chosen, [1, 0, 2])
    assert ordered < 0.01 * given
