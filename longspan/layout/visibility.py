"""Which blocks of queries and keys are computed: plain integers from a layout, and never a mask.

The keys that a run of queries may see are cut into blocks of three kinds, the only ones that the kernels know:

    full         every query sees every key
    causal       a square: query i of the block sees its keys 0 to i
    anticausal   a square: query i of the block sees its keys i to the last

What the causal, window or document mask removes whole is in no block. A causal window of w tokens is a band: cut into runs
of w queries, each run is a causal square on itself and an anticausal square on the w − 1 keys before it, so a band costs
what its pairs cost and takes no mask either. Equal blocks at equal distances are one `VisibleBlock` with a `count`: they run as
batch rows of one kernel call.

Positions are *global* (in the sequence), *local* (in a rank's tokens, `SequenceLayout.segments` laid end to end) or in a
*buffer* of keys, which holds given global runs laid end to end.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from longspan.layout.sequence_layout import SequenceLayout

Run = tuple[int, int]
"""Positions [start, stop)."""

Mask = Literal["full", "causal", "anticausal"]

LARGEST_GROUPED = 1024
"""Blocks of more queries are not grouped: each is worth a kernel call, and where rows must be copied the copy is large."""


@dataclass(frozen=True)
class VisibleBlock:
    """`count` blocks of queries (local positions) and keys (positions in a buffer), each `period` after the one before."""

    query_start: int
    num_queries: int
    key_start: int
    num_keys: int
    mask: Mask
    count: int = 1
    period: int = 0
    opens: bool = False
    """Its queries are in no earlier block of the list. All queries are in a block that opens, or no block does."""

    @property
    def num_pairs(self) -> int:
        """Number of (query, key) pairs that see each other."""
        pairs = self.num_queries * self.num_keys
        return self.count * (pairs if self.mask == "full" else (pairs + self.num_queries) // 2)


@dataclass(frozen=True)
class Visibility:
    """Who sees whom: tokens of one document, up to the query if `causal`, less than `window` tokens away."""

    documents: tuple[int, ...]
    causal: bool
    window: int | None

    def span(self, document: Run, queries: Run) -> Run:
        """The keys that any of `queries` sees, all of one document."""
        start, stop = document
        if self.window is not None:
            start, stop = max(start, queries[0] - self.window + 1), min(stop, queries[1] + self.window - 1)
        return start, min(stop, queries[1]) if self.causal else stop

    def num_pairs(self, queries: Run) -> int:
        """Number of (query, key) pairs of the queries of a global run, over all keys."""
        return sum(
            _num_visible_before(piece, document, self.window)
            + (0 if self.causal else _num_visible_after(piece, document, self.window))
            for piece, document in pieces(queries, self.documents)
        )


def visibility_of(layout: SequenceLayout, causal: bool, window: int | None) -> Visibility:
    """Who sees whom of the layout's tokens."""
    return Visibility(layout.document_bounds, causal, None if window is None or window >= layout.seq_len else window)


def plan_blocks(
    queries: Sequence[Run], keys: Sequence[Run], visibility: Visibility, *, opening: bool = False
) -> tuple[VisibleBlock, ...]:
    """The blocks of a rank's queries on a buffer of keys.

    Args:
        queries: global runs in local order.
        keys: global runs in the buffer's order; disjoint.
        visibility: who sees whom.
        opening: whether these are the first blocks of the queries. Those that open then come first.
    """
    blocks: list[VisibleBlock] = []
    query_offset = 0
    for run in queries:
        for piece, document in pieces(run, visibility.documents):
            seen = visibility.span(document, piece)
            key_offset = 0
            for start, stop in keys:
                visible = max(start, seen[0]), min(stop, seen[1])
                if visible[0] < visible[1]:
                    query_shift, key_shift = query_offset - run[0], key_offset - start
                    blocks.extend(
                        replace(x, query_start=x.query_start + query_shift, key_start=x.key_start + key_shift)
                        for x in _blocks(piece, visible, visibility)
                    )
                key_offset += stop - start
        query_offset += run[1] - run[0]
    joined = _joined(blocks)
    return tuple(_merged_equal_blocks(_opened(joined, query_offset) if opening else joined))


def needed_keys(queries: Sequence[Run], visibility: Visibility) -> list[Run]:
    """Sorted, disjoint global runs of the keys that any of the queries sees."""
    return union(
        visibility.span(document, piece) for run in queries for piece, document in pieces(run, visibility.documents)
    )


def pieces(run: Run, documents: tuple[int, ...]) -> Iterator[tuple[Run, Run]]:
    """(piece, its document) of each document that has tokens in a global run."""
    start, stop = run
    index = bisect_right(documents, start) - 1
    while start < stop:
        document = documents[index], documents[index + 1]
        yield (start, min(stop, document[1])), document
        start = document[1]
        index += 1


def union(runs: Iterable[Run]) -> list[Run]:
    """The positions of any of `runs`, as sorted, disjoint runs that do not touch."""
    merged: list[Run] = []
    for start, stop in sorted(run for run in runs if run[0] < run[1]):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], stop)
        else:
            merged.append((start, stop))
    return merged


def intersection(left: Sequence[Run], right: Sequence[Run]) -> list[Run]:
    """The positions in both of two lists of runs, in the order of `left`."""
    both = ((max(a, c), min(b, d)) for a, b in left for c, d in right)
    return [run for run in both if run[0] < run[1]]


def difference(runs: Sequence[Run], removed: Sequence[Run]) -> list[Run]:
    """The positions of sorted `runs` that are in none of `removed`."""
    for start, stop in removed:
        runs = [part for a, b in runs for part in ((a, min(b, start)), (max(a, stop), b)) if part[0] < part[1]]
    return list(runs)


def length(runs: Iterable[Run]) -> int:
    """Number of positions."""
    return sum(stop - start for start, stop in runs)


def located(runs: Sequence[Run], buffer: Sequence[Run]) -> list[Run]:
    """Where the positions of `runs` stand in a buffer that holds the runs `buffer` laid end to end; those not in it left out.

    In the order of `runs`.
    """
    found: list[tuple[int, int, Run]] = []
    for index, (start, stop) in enumerate(runs):
        offset = 0
        for first, last in buffer:
            a, b = max(start, first), min(stop, last)
            if a < b:
                found.append((index, a, (offset + a - first, offset + b - first)))
            offset += last - first
    return [run for _, _, run in sorted(found)]


def inverse_places(places: Sequence[Run]) -> list[Run]:
    """The inverse of a permutation: given where consecutive tokens go, which tokens stand at positions 0, 1, 2, ..."""
    sources: list[tuple[int, Run]] = []
    offset = 0
    for start, stop in places:
        sources.append((start, (offset, offset + stop - start)))
        offset += stop - start
    return [run for _, run in sorted(sources)]


def touches(runs: Sequence[Run]) -> bool:
    """Whether the runs lie end to end, in this order."""
    return all(left[1] == right[0] for left, right in pairwise(runs))


def _blocks(queries: Run, keys: Run, visibility: Visibility) -> Iterator[VisibleBlock]:
    """Blocks of a run of queries and a run of keys of one document, in global positions."""
    window = visibility.window
    # Query i sees the keys from i - behind to i + ahead.
    ahead = 0 if visibility.causal else None if window is None else window - 1
    if window is None or queries[1] - window <= keys[0]:
        yield from _up_to(queries, keys, ahead)
        return
    behind = window - 1
    assert ahead is not None
    for start in range(queries[0], queries[1], window):
        # A run of no more queries than the window: no key is at both edges of the band.
        stop = min(start + window, queries[1])
        left, right = stop - 1 - behind, start + ahead
        yield from _mirrored(_up_to((1 - stop, 1 - start), (1 - min(left, keys[1]), 1 - keys[0]), behind))
        yield from _up_to((start, stop), (max(keys[0], left), min(keys[1], right)), None)
        yield from _up_to((start, stop), (max(keys[0], left, right), min(keys[1], stop + ahead)), ahead)


def _up_to(queries: Run, keys: Run, ahead: int | None) -> Iterator[VisibleBlock]:
    """Blocks in which query i sees the keys up to i + ahead; all of them where `ahead` is None."""
    if keys[0] >= keys[1]:
        return
    if ahead is None:
        yield from _full(queries, keys)
        return
    # From `first` on, queries see keys; from `last` on, all of them. Between stands a square, and full keys before it.
    first = max(queries[0], keys[0] - ahead)
    last = max(first, min(queries[1], keys[1] - ahead))
    if first < last:
        yield VisibleBlock(first, last - first, first + ahead, last - first, "causal")
        yield from _full((first, last), (keys[0], first + ahead))
    yield from _full((last, queries[1]), keys)


def _full(queries: Run, keys: Run) -> Iterator[VisibleBlock]:
    if queries[0] < queries[1] and keys[0] < keys[1]:
        yield VisibleBlock(queries[0], queries[1] - queries[0], keys[0], keys[1] - keys[0], "full")


def _mirrored(blocks: Iterable[VisibleBlock]) -> Iterator[VisibleBlock]:
    """Blocks with every position x at −x: "up to" becomes "from"."""
    for block in blocks:
        yield replace(
            block,
            query_start=1 - block.query_start - block.num_queries,
            key_start=1 - block.key_start - block.num_keys,
            mask="anticausal" if block.mask == "causal" else "full",
        )


def _num_visible_before(queries: Run, document: Run, window: int | None) -> int:
    """Pairs of the queries with themselves and keys before them: each sees its distance to the start, up to the window."""
    first, last = queries[0] - document[0] + 1, queries[1] - document[0]
    return _sum_of_smaller(first, last, window)


def _num_visible_after(queries: Run, document: Run, window: int | None) -> int:
    """Pairs of the queries with keys after them."""
    first, last = document[1] - queries[1], document[1] - queries[0] - 1
    return _sum_of_smaller(first, last, None if window is None else window - 1)


def _sum_of_smaller(first: int, last: int, limit: int | None) -> int:
    """Σ min(x, limit) for x = first … last."""
    if limit is None or last <= limit:
        return (first + last) * (last - first + 1) // 2
    if first >= limit:
        return limit * (last - first + 1)
    return (first + limit) * (limit - first + 1) // 2 + limit * (last - limit)


def _joined(blocks: list[VisibleBlock]) -> list[VisibleBlock]:
    """The same pairs in fewer blocks: full blocks side by side, and squares that a full block makes one larger square."""
    size = len(blocks) + 1
    while len(blocks) < size:
        size = len(blocks)
        blocks = _joined_along("key", _joined_along("query", blocks))
    return _joined_squares(blocks)


def _joined_along(side: Literal["query", "key"], blocks: list[VisibleBlock]) -> list[VisibleBlock]:
    """Full blocks with the same queries or keys, and adjacent on the other `side`, as one."""

    def key(block: VisibleBlock) -> tuple[bool, int, int, int]:
        queries, keys = (block.query_start, block.num_queries), (block.key_start, block.num_keys)
        same, start = (keys, queries[0]) if side == "query" else (queries, keys[0])
        return block.mask == "full", *same, start

    joined: list[VisibleBlock] = []
    for block in sorted(blocks, key=key):
        last = joined[-1] if joined else None
        if last is not None and block.mask == "full" and key(last)[:3] == key(block)[:3]:
            if side == "query" and last.query_start + last.num_queries == block.query_start:
                joined[-1] = replace(last, num_queries=last.num_queries + block.num_queries)
                continue
            if side == "key" and last.key_start + last.num_keys == block.key_start:
                joined[-1] = replace(last, num_keys=last.num_keys + block.num_keys)
                continue
        joined.append(block)
    return joined


def _joined_squares(blocks: list[VisibleBlock]) -> list[VisibleBlock]:
    """Two causal squares on one diagonal with the full block below the first as one square."""
    full = {(x.query_start, x.num_queries, x.key_start, x.num_keys): x for x in blocks if x.mask == "full"}
    squares: list[VisibleBlock] = []
    for block in sorted((x for x in blocks if x.mask == "causal"), key=lambda x: x.query_start):
        if squares:
            last = squares[-1]
            below = (block.query_start, block.num_queries, last.key_start, last.num_keys)
            if (last.query_start + last.num_queries, last.key_start + last.num_keys) == (
                block.query_start,
                block.key_start,
            ) and below in full:
                del full[below]
                size = last.num_queries + block.num_queries
                squares[-1] = replace(last, num_queries=size, num_keys=size)
                continue
        squares.append(block)
    mirrored = sorted((x for x in blocks if x.mask == "anticausal"), key=lambda x: x.query_start)
    return [*squares, *full.values(), *mirrored]


def _opened(blocks: list[VisibleBlock], num_queries: int) -> list[VisibleBlock]:
    """Blocks that open first, if such blocks hold every query; by position."""
    blocks = sorted(blocks, key=lambda x: (x.mask != "causal", x.query_start, x.key_start))
    for order in (blocks, sorted(blocks, key=lambda x: -x.num_queries)):
        opened: list[Run] = []
        opening: list[int] = []
        # A sweep over the queries: a block opens if it starts where the last that opened ended, or later.
        for block in order:
            run = block.query_start, block.query_start + block.num_queries
            if not _overlaps(run, opened):
                opened = union([*opened, run])
                opening.append(id(block))
        if opened == [(0, num_queries)]:
            chosen = set(opening)
            return [
                *(replace(x, opens=True) for x in blocks if id(x) in chosen),
                *(x for x in blocks if id(x) not in chosen),
            ]
    return blocks


def _overlaps(run: Run, runs: list[Run]) -> bool:
    """Whether `run` shares a position with one of sorted, disjoint `runs`."""
    index = bisect_right(runs, (run[0], run[1]))
    return any(a < run[1] and run[0] < b for a, b in runs[max(0, index - 1) : index + 1])


def _merged_equal_blocks(blocks: list[VisibleBlock]) -> list[VisibleBlock]:
    """Small equal blocks at equal distances as one."""
    grouped: list[VisibleBlock] = []
    for block in blocks:
        if grouped:
            last = grouped[-1]
            period = block.query_start - (last.query_start + (last.count - 1) * last.period)
            if (
                block.num_queries <= min(LARGEST_GROUPED, period)
                and (last.num_queries, last.num_keys, last.mask, last.opens)
                == (block.num_queries, block.num_keys, block.mask, block.opens)
                and block.key_start - (last.key_start + (last.count - 1) * last.period) == period
                and last.period in (0, period)
            ):
                grouped[-1] = replace(last, count=last.count + 1, period=period)
                continue
        grouped.append(block)
    return grouped
