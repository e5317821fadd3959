"""How many tokens each rank holds: equally many, or a share by its weight. Whole numbers alone, so that all ranks agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import isfinite, lcm
from typing import Any

from torch import Tensor

from longspan.checks import described, is_int
from longspan.errors import LayoutError
from longspan.layout.documents import shortened


def check_weights(weights: Any, num_ranks: int) -> tuple[float, ...] | None:
    """`weights` as a user gives them, one for each rank, as floats; None where they are all equal, which is no weights.

    Raises:
        LayoutError: for what is no list of one number for each rank, and for numbers that are negative, not finite, or all zero.
    """
    if weights is None:
        return None
    if isinstance(weights, Tensor):
        if hasattr(type(weights), "to_local") or weights.dim() != 1:
            raise LayoutError(
                f"weights must be a list of {num_ranks} numbers, one for each rank, the same on every rank; got "
                f"{described(weights)}. Pass weights.tolist() of a plain tensor [{num_ranks}]"
            )
        weights = weights.tolist()
    if isinstance(weights, str | bytes | Mapping) or not hasattr(weights, "__getitem__"):
        raise LayoutError(
            f"weights must be a list of {num_ranks} numbers, one for each rank; got {described(weights)}. Give each rank's speed, "
            "as in [1.0, 0.5]"
        )
    given = list(weights)
    if len(given) != num_ranks:
        raise LayoutError(
            f"weights must be one number for each of the {num_ranks} ranks; got {len(given)}: {shortened(given)}. Give each "
            "rank's speed, in the order of the group's ranks"
        )
    for rank, weight in enumerate(given):
        is_number = not isinstance(weight, bool | str | bytes | complex) and hasattr(weight, "__float__")
        if not is_number or not isfinite(float(weight)) or float(weight) < 0:
            raise LayoutError(
                f"weights must be finite numbers of at least 0; got {described(weight)} for rank {rank}. Give the speed of the "
                "rank in proportion to the others, or 0 for as few tokens as a rank may hold, which is one"
            )
    numbers = tuple(float(weight) for weight in given)
    if not any(numbers):
        raise LayoutError(
            f"weights are zero for all {num_ranks} ranks, and then nobody holds the tokens. Give at least one rank a weight above "
            "0, or leave weights out for equal shares"
        )
    return None if len(set(numbers)) == 1 else numbers


def check_rank_order(rank_order: Any, num_ranks: int) -> tuple[int, ...]:
    """`rank_order` as a user gives it; the ranks as they are numbered where it is None.

    Raises:
        LayoutError: for what does not hold each rank once.
    """
    if rank_order is None:
        return tuple(range(num_ranks))
    given = list(rank_order) if isinstance(rank_order, list | tuple) else None
    if given is None or not all(is_int(rank) for rank in given) or sorted(given) != list(range(num_ranks)):
        raise LayoutError(
            f"rank_order must hold each of the ranks 0 to {num_ranks - 1} once, in the order in which they hold the sequence; got "
            f"{shortened(rank_order)}. Take what longspan.plan.chain_order returns, or leave it out"
        )
    return tuple(given)


def tokens_of_ranks(seq_len: int, weights: Sequence[float]) -> tuple[int, ...]:
    """The number of tokens of each rank, in proportion to its weight: exact shares rounded down or up, and at least one token.

    The tokens that rounding down leaves go to the ranks that it takes most from, of equals to the lower ones. A rank that would
    hold no token takes one from the rank that then has most, of equals the lowest.
    """
    fractions = [Fraction(weight) for weight in weights]
    common = lcm(*(fraction.denominator for fraction in fractions))
    whole = [int(fraction * common) for fraction in fractions]
    total = sum(whole)
    counts = [seq_len * weight // total for weight in whole]
    rests = [seq_len * weight % total for weight in whole]
    by_rest = sorted(range(len(whole)), key=lambda rank: (-rests[rank], rank))
    for rank in by_rest[: seq_len - sum(counts)]:
        counts[rank] += 1
    for rank, count in enumerate(counts):
        if count == 0:
            counts[max(range(len(counts)), key=lambda other: (counts[other], -other))] -= 1
            counts[rank] = 1
    return tuple(counts)


def tokens_of_rank(
    seq_len: int, rank: int, rank_order: Sequence[int], segments_per_rank: int, weights: Sequence[float] | None
) -> int:
    """The number of tokens that one rank holds; arguments as of `segment_lengths`."""
    # A compiler follows this for a length that it keeps variable.
    num_ranks = len(rank_order)
    if num_ranks == 1:
        return seq_len
    if weights is not None:
        return tokens_of_ranks(int(seq_len), weights)[rank]
    num_segments = num_ranks * segments_per_rank
    base, longer = seq_len // num_segments, seq_len % num_segments
    place = rank_order.index(rank)
    own = [place, num_segments - 1 - place][:segments_per_rank]
    return sum(base + (index < longer) for index in own)


def segment_lengths(
    seq_len: int, rank_order: Sequence[int], segments_per_rank: int, weights: Sequence[float] | None
) -> tuple[int, ...]:
    """The length of each segment, in global order; rank_order: which rank holds the first, the second, ...

    Without weights all are of nearly equal lengths, the longer ones first. With weights a rank's tokens are those of
    `tokens_of_ranks`; of its two segments in zigzag order the first is the longer one, if any.
    """
    if weights is None:
        num_segments = len(rank_order) * segments_per_rank
        if num_segments == 1:
            # A compiler may hold the length as a symbol.
            return (seq_len,)
        base, longer = divmod(seq_len, num_segments)
        return tuple(base + (index < longer) for index in range(num_segments))
    of_ranks = tokens_of_ranks(int(seq_len), weights)
    counts = tuple(of_ranks[rank] for rank in rank_order)
    if segments_per_rank == 1:
        return counts
    return (*(-(-count // 2) for count in counts), *(count // 2 for count in reversed(counts)))
