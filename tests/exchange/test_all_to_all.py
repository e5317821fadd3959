"""all_to_all: right whatever the number of rows and ranks, and what a rank sends stops growing with the number of ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longspan.exchange import AllToAll, record_traffic
from longspan.exchange.scan_by_rows import Shares
from longspan.layout import SequenceLayout
from longspan.state import ChannelDecay, Dense, Form, HeadDecay, Identity, ScalarDecay
from tests.compare import worst
from tests.exchange.scan import errors_of_scan, layouts, random_rates
from tests.ranks import run_on_ranks

KINDS: list[Form] = [Identity, HeadDecay, ScalarDecay, ChannelDecay, Dense]


@pytest.mark.parametrize("num_rows", [1, 2, 6, 15, 16])
def test_rows_are_shared_out_as_evenly_as_may_be(num_rows: int) -> None:
    for num_members in (1, 2, 4, 7):
        members = [Shares(None, num_members, place, num_rows) for place in range(num_members)]
        counts = members[0].counts
        assert sum(counts) == num_rows and max(counts) - min(counts) <= 1
        taken = [row for member in members for row in range(num_rows)[member.own]]
        assert taken == list(range(num_rows))


def errors_for_rows(batch: int, num_heads: int, order: Any) -> list[float]:
    shape = (batch, num_heads, 4, 5)
    return [
        error
        for layout in layouts(order)
        for kind in [*KINDS, random_rates(num_heads, 4)]
        for error in errors_of_scan(AllToAll(), kind, shape, layout)
    ]


@pytest.mark.slow_rows(r"^(1-5|1-1|2-1|3-3)-contiguous")
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^(2-1|1-5)-zigzag$")
@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
@pytest.mark.parametrize(("batch", "num_heads"), [(1, 1), (2, 1), (1, 5), (3, 3)])
def test_rows_fewer_than_ranks_or_not_a_multiple_of_them(batch: int, num_heads: int, order: str) -> None:
    for errors in run_on_ranks(4, errors_for_rows, batch, num_heads, order):
        assert worst(errors) < 1e-12


def bytes_of_exchange(order: Any) -> tuple[list[int], list[int]]:
    layout = SequenceLayout(64, order=order)
    with record_traffic() as traffic:
        errors_of_scan(AllToAll(), ChannelDecay, (1, 24, 4, 5), layout, torch.float32)
    return [event.bytes_sent for event in traffic.events], [event.num_messages for event in traffic.events]


@pytest.mark.parametrize(("order", "segments"), [("contiguous", 1), ("zigzag", 2)])
def test_what_a_rank_sends_does_not_grow_with_the_number_of_ranks(order: str, segments: int) -> None:
    state, transition = 24 * 4 * 5 * 4, 24 * 4 * 4
    for num_ranks in (2, 4, 8):
        for sent, messages in run_on_ranks(num_ranks, bytes_of_exchange, order):
            whole = [state + transition, state, state, state]
            assert sent == [segments * numbers * (num_ranks - 1) // num_ranks for numbers in whole]
            assert messages == [num_ranks - 1] * 4
