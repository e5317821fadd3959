"""Which share of a sequence each rank should hold, so that all of them take equally long: arithmetic on the ranks' speeds.

A rank that computes the whole sequence alone would take a seconds for all but the products of softmax attention, and b for these.
Of a share s of the tokens it takes s · a for the first. For the second it takes

    s · b                      where all tokens see about equally many: in zigzag order, in a window, in short documents
    (2 x s + s²) · b           where one document's tokens see all before them, and the share begins behind x of the sequence
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

_DIGITS = 4
"""Decimals of a share: speeds are measured with fewer, and a person reads them."""


@dataclass(frozen=True)
class RankSeconds:
    """What one rank would take for a whole sequence, in any unit: all but products of softmax attention, and these.

    rest: more than 0. attention: 0 where there are no softmax layers.
    """

    rest: float
    attention: float


def balanced_shares(ranks: Sequence[RankSeconds], *, grows: bool) -> tuple[float, ...]:
    """The share of the tokens of each rank with which all ranks take equally long, rounded to four decimals, each above 0.

    ranks: in the order in which they hold the sequence. grows: whether a token sees all tokens before it, and ranks hold one run
    each (contiguous order, one document, no window), so that later ranks have more to attend to.
    """
    if grows:
        shares = _growing_shares(ranks)
    else:
        speeds = [1.0 / (rank.rest + rank.attention) for rank in ranks]
        shares = [speed / sum(speeds) for speed in speeds]
    return tuple(max(round(share, _DIGITS), 10.0**-_DIGITS) for share in shares)


def _growing_shares(ranks: Sequence[RankSeconds]) -> list[float]:
    # The shares of all grow with the time that each is given: halve the interval until they make up the sequence.
    low, high = 0.0, sum(rank.rest + rank.attention for rank in ranks)
    for _ in range(100):
        middle = (low + high) / 2
        if sum(_shares_within(ranks, middle)) < 1.0:
            low = middle
        else:
            high = middle
    shares = _shares_within(ranks, high)
    return [share / sum(shares) for share in shares]


def _shares_within(ranks: Sequence[RankSeconds], seconds: float) -> list[float]:
    """The share that each rank computes in so many seconds, one behind the other."""
    shares: list[float] = []
    for rank in ranks:
        linear = rank.rest + 2 * rank.attention * sum(shares)
        # s² · b + s · linear = seconds, without the difference of nearly equal numbers.
        shares.append(2 * seconds / (linear + sqrt(linear**2 + 4 * rank.attention * seconds)))
    return shares
