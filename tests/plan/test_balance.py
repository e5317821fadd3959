"""Shares by speed: all ranks take equally long, whatever they are slow in."""

from __future__ import annotations

import itertools

import pytest

from longspan.plan.balance import RankSeconds, balanced_shares
from tests.compare import worst

SLOW = [
    [RankSeconds(1.0, 0.0), RankSeconds(2.0, 0.0)],
    [RankSeconds(1.0, 3.0), RankSeconds(1.0, 3.0), RankSeconds(2.0, 3.0), RankSeconds(1.0, 9.0)],
    [RankSeconds(1e-9, 1.0), RankSeconds(1e-9, 1.0), RankSeconds(1e-9, 1.0)],
    [RankSeconds(5.0, 0.1), RankSeconds(1e3, 2.0)],
]


def seconds(ranks: list[RankSeconds], shares: tuple[float, ...], grows: bool) -> list[float]:
    """Of each rank, by adding up its tokens in small pieces."""
    taken, start, pieces = [], 0.0, 2000
    for rank, share in zip(ranks, shares, strict=True):
        piece = share / pieces
        seen = [2 * (start + (number + 0.5) * piece) if grows else 1.0 for number in range(pieces)]
        taken.append(sum(piece * (rank.rest + rank.attention * each) for each in seen))
        start += share
    return taken


@pytest.mark.parametrize(("ranks", "grows"), list(itertools.product(SLOW, (False, True))))
def test_all_ranks_take_equally_long_and_hold_everything(ranks: list[RankSeconds], grows: bool) -> None:
    shares = balanced_shares(ranks, grows=grows)
    assert sum(shares) == pytest.approx(1.0, abs=1e-4 * len(shares))
    taken = seconds(ranks, shares, grows)
    # Rounded to four decimals.
    assert worst(abs(each / taken[0] - 1) for each in taken) < 1e-4 / min(shares)


def test_a_rank_that_is_slow_twice_holds_half_as_much() -> None:
    assert balanced_shares([RankSeconds(1.0, 1.0), RankSeconds(2.0, 2.0)], grows=False) == (0.6667, 0.3333)


def test_later_ranks_of_one_document_hold_less() -> None:
    # The square root of a half: the first of two ranks attends to half of the pairs.
    first, second = balanced_shares([RankSeconds(1e-12, 1.0)] * 2, grows=True)
    assert (first, second) == (0.7071, 0.2929)


def test_a_rank_that_hardly_computes_still_has_a_share() -> None:
    assert min(balanced_shares([RankSeconds(1.0, 0.0), RankSeconds(1e9, 0.0)], grows=False)) == 1e-4
