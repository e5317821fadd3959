"""Ranks with uneven shares of the tokens: every operator, exchange and layer gives what it gives with equal ones."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from longspan.attention.softmax import SoftmaxMethod
from longspan.exchange import TOPOLOGIES
from longspan.layout import Order, SequenceLayout
from longspan.ops.variants import VARIANTS
from tests.attention import (
    test_bidirectional,
    test_convolution,
    test_long_convolution,
    test_published_layers,
    test_selective_scan,
)
from tests.attention.long_convolution_reference import KINDS
from tests.attention.softmax_reference import Case, compare
from tests.attention.test_conformance import PACKINGS, assert_right, packings_of, worst_on_rank
from tests.attention.test_softmax import PACKED
from tests.compare import worst
from tests.models import test_decoding
from tests.ranks import run_on_ranks
from tests.uneven import with_weights

# A rank of no weight holds one token, so that its second segment in zigzag order is empty.
WEIGHTS = {2: (1.0, 0.2), 3: (1.0, 0.0, 2.5), 4: (0.5, 3.0, 1.0, 1.0)}
ORDERS: tuple[Order, ...] = ("contiguous", "zigzag")


def on_ranks(num_ranks: int, function: Any, *arguments: Any) -> list[Any]:
    return run_on_ranks(num_ranks, with_weights, WEIGHTS[num_ranks], function, *arguments)


def test_the_suites_below_see_uneven_layouts() -> None:
    assert on_ranks(3, counts, "zigzag") == [(17, 1, 42)] * 3
    assert on_ranks(2, counts, "contiguous") == [(50, 10)] * 2


def counts(order: Order) -> tuple[int, ...]:
    return SequenceLayout(60, order=order).tokens_of


# Shares are the layout's matter: beside one chain, what else counts segments by itself.
@pytest.mark.slow_rows(r"^3-simple_gla-(all_gather|pipelined|auto)$", r"^3-gated_delta_rule-(?!all_gather$)")
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^3-simple_gla-(all_to_all|ring)$")
@pytest.mark.parametrize("exchange", [*TOPOLOGIES, "auto"])
@pytest.mark.parametrize("name", ["simple_gla", "gated_delta_rule"])
@pytest.mark.parametrize("num_ranks", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_every_topology_equals_the_recurrent_form(name: str, exchange: str, num_ranks: int) -> None:
    # Documents that reach no further than the next segment do where it has one token.
    weights = (2.0, *(1.0,) * (num_ranks - 1)) if exchange == "neighbour" else WEIGHTS[num_ranks]
    cases = [(order, packing, 43, "fused") for order in ORDERS for packing in packings_of(exchange)]
    assert_right(run_on_ranks(num_ranks, with_weights, weights, worst_on_rank, name, exchange, cases))


# A decay that is known from the lengths of segments, one that is sent, and a matrix.
@pytest.mark.slow_rows(r"^(?!(retention|gla|gated_delta_rule)$)")
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_equals_the_recurrent_form(name: str) -> None:
    cases = [(order, packing, 37, "overlapped") for order, packing in zip(ORDERS, packings_of("auto"), strict=True)]
    assert_right(on_ranks(3, worst_on_rank, name, "all_gather", cases))


# A chain, and what knows by itself who holds which segment.
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^ring$")
@pytest.mark.parametrize("exchange", ["all_gather", "ring", pytest.param("all_to_all", marks=pytest.mark.slow)])
def test_the_selective_scan_equals_its_recurrence(exchange: str) -> None:
    cases = [(order, packing, 43, form) for order in ORDERS for packing in PACKINGS for form in ("softplus", "steps")]
    assert_right(on_ranks(3, test_selective_scan.worst_on_rank, exchange, cases))


@pytest.mark.slow_rows(
    r"^function-", r"^complex exponentials-zigzag-0$", r"^(taps|exponentials)-contiguous-1$", r"zigzag-1$"
)
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^taps-zigzag-0$", r"^complex exponentials-contiguous-1$")
@pytest.mark.parametrize("documents_number", [0, 1])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", KINDS)
def test_long_convolutions_equal_their_definition(kind: str, order: Order, documents_number: int) -> None:
    options = {"with_states": True}
    for error, what in on_ranks(3, test_long_convolution.worst_error, kind, order, documents_number, options):
        assert error < 1e-11, what


@pytest.mark.parametrize("order", ORDERS)
def test_rwkv7_equals_its_recurrence(order: Order) -> None:
    for documents in (None, test_published_layers.PACKED):
        for errors in on_ranks(3, test_published_layers.errors_on_rank, "rwkv7", 41, order, documents):
            assert worst(errors) < test_published_layers.TOLERANCE, (documents, errors)


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^3-ulysses$")
@pytest.mark.parametrize("method", ["all_gather", "ring", "ulysses"])
@pytest.mark.parametrize("num_ranks", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_every_softmax_method_equals_dense_attention(method: SoftmaxMethod, num_ranks: int) -> None:
    cases = [
        Case(53, method, order, causal, window, documents, heads=(12, 4), dim=4)
        for order, causal, window, documents in itertools.product(ORDERS, (True, False), (None, 7), (None, PACKED))
    ]
    for rank, answers in enumerate(on_ranks(num_ranks, compare, cases)):
        for case, errors in zip(cases, answers, strict=True):
            assert worst(errors) <= 1e-11, (rank, case, errors)


@pytest.mark.parametrize("order", ORDERS)
def test_convolutions_and_shifts_equal_their_definitions(order: Order) -> None:
    for documents in (None, [0, 3, 5, 30, 43]):
        for taps in (2, 7):
            for errors in on_ranks(3, test_convolution.errors_on_rank, 43, taps, documents, order):
                assert worst(errors) < 1e-11, (documents, taps, errors)


@pytest.mark.parametrize("order", ORDERS)
def test_bidirectional_layers_equal_the_plain_sum(order: Order) -> None:
    for documents in (None, [0, 1, 2, 9, 30, 40]):
        for errors in on_ranks(3, test_bidirectional.errors_on_rank, "retention", order, 40, documents, 1):
            assert worst(errors) < 1e-10, (documents, errors)


# A state alone; and one behind a scan, a short convolution, a long one, or a shift of tokens.
# In even shares it runs in make test, in `tests/models/test_decoding.py`.
@pytest.mark.slow
@pytest.mark.parametrize("operator", ["gla", "mamba", "chela", "rwkv7"])
def test_a_prompt_over_ranks_is_remembered_as_by_one(operator: str) -> None:
    for found in on_ranks(3, test_decoding.differences_of_all, operator):
        for what, (error, same) in found.items():
            assert error < 1e-11 and same, (what, error)
