"""When LASP-2's own order of a call pays, by the model: times by hand for round numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from longspan.plan import Cluster, Cost, DirectionCost, Link, Reading, overlap_pays

LINK = Link(latency=1e-4, bandwidth=1e8)
CLUSTER = Cluster(2, 2, LINK, LINK, fold_latency=0.0, fold_bandwidth=1e9, matmul_rate=1e9)
# 2 · 1 · 100 · 10 · (20 + 30) = 1e5 operations inside; 100 · (20 + 60) · 4 bytes in the second pass, 100 · (40 + 30) · 4 backward.
READING = Reading(num_tokens=100, chunk_size=10, num_rows=1, key_size=20, value_size=30, number_bytes=4)


def cost_of(forward: float, backward: float, at_wait: float = 0.0) -> Cost:
    return Cost("ring", DirectionCost(forward, at_wait, 0, 0, 0), DirectionCost(backward, at_wait, 0, 0, 0))


def test_both_passes_take_what_their_operations_and_bytes_take() -> None:
    assert READING.seconds_inside(CLUSTER, False) == pytest.approx(1e-4)
    assert READING.seconds_inside(CLUSTER, True) == pytest.approx(2.5e-4)
    assert READING.seconds_of_second_pass(CLUSTER, False) == pytest.approx(3.2e-5)
    assert READING.seconds_of_second_pass(CLUSTER, True) == pytest.approx(2.8e-5)


def test_a_second_pass_of_few_tokens_takes_its_launches() -> None:
    slow_to_launch = replace(CLUSTER, fold_latency=1e-5)
    reading = replace(READING, num_launches=15)
    for backward in (False, True):
        more = reading.seconds_of_second_pass(slow_to_launch, backward) - READING.seconds_of_second_pass(
            CLUSTER, backward
        )
        assert more == pytest.approx(15e-5)


# Inside: 1e-4 forward and 2.5e-4 backward; second passes: 3.2e-5 and 2.8e-5, which must be hidden twice over.
@pytest.mark.parametrize(
    ("cost", "with_backward", "pays"),
    [
        (cost_of(1.0, 1.0), True, True),
        (cost_of(1.0, 1.0), False, True),
        (cost_of(6.1e-5, 6.1e-5), True, True),
        (cost_of(5.9e-5, 5.9e-5), True, False),
        (cost_of(6.3e-5, 1.0), False, False),
        (cost_of(6.5e-5, 0.0), False, True),
    ],
)
def test_it_pays_where_twice_the_second_passes_are_hidden(cost: Cost, with_backward: bool, pays: bool) -> None:
    assert overlap_pays(cost, CLUSTER, READING, with_backward) is pays


def test_a_slow_exchange_hides_no_more_than_the_pass_inside() -> None:
    few = replace(READING, chunk_size=1)
    # Inside 1e-5 and 2.5e-5: less than the second passes, however slow the link.
    assert not overlap_pays(cost_of(1.0, 1.0), CLUSTER, few, True)


def test_what_is_computed_where_the_caller_waits_is_not_hidden() -> None:
    assert not overlap_pays(cost_of(1.0, 1.0, at_wait=1.0), CLUSTER, READING, True)


def test_with_more_tokens_the_second_pass_outgrows_the_exchange() -> None:
    cost = cost_of(1e-3, 1e-3)
    pays = [overlap_pays(cost, CLUSTER, replace(READING, num_tokens=n), True) for n in (100, 1000, 100_000)]
    assert pays == [True, True, False]
