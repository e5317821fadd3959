"""Which blocks of queries and keys a rank computes, and whose gradients it owes whom: plain integers from the layout.

Each run of this rank's tokens in one segment and document (a *piece*) attends to at most two blocks, so no mask is ever
built and what the causal or document mask removes whole is not computed:

    prefix    all earlier tokens of its document          no mask, keys that other ranks hold
    diagonal  the piece itself                            causal, keys of this rank

Bidirectional attention has one block: all tokens of the document. A block whose keys are this rank's own needs no other
rank.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from longspan.layout import SequenceLayout

Run = tuple[int, int]
"""Positions [start, stop)."""


@dataclass(frozen=True)
class Block:
    """Local queries ``[query_start, query_stop)`` on keys ``[key_start, key_stop)``.

    Keys are local positions in a plan's `local` blocks and global ones in its `gathered` blocks. `causal`: query i of
    the block sees its keys 0 to i.
    """

    query_start: int
    query_stop: int
    key_start: int
    key_stop: int
    causal: bool


@dataclass(frozen=True)
class Plan:
    """Everything one rank computes and exchanges in one softmax layer."""

    local: tuple[Block, ...]
    """Blocks on this rank's own keys."""
    gathered: tuple[Block, ...]
    """Blocks on keys of the whole sequence. A query is in at most one block of each kind."""
    exchanges: bool
    """Whether any rank has gathered blocks: the same on all of them."""
    segments: tuple[Run, ...]
    """Global runs that this rank holds, in local order."""
    key_span: Run
    """The global keys between the first and the last that `gathered` reads."""
    sends: tuple[tuple[Run, ...], ...]
    """For each rank, the global runs whose key gradients this rank computed for it; none for itself."""
    receives: tuple[tuple[Run, ...], ...]
    """For each rank, the local runs for which it computed key gradients; none for itself."""
    owns: tuple[tuple[Run, Run], ...]
    """(global run, local run) of this rank's own tokens that its gathered blocks read."""


def plan_blocks(layout: SequenceLayout, causal: bool) -> Plan:
    """The plan of `layout`'s rank, made once a layout."""
    return layout.cached(("softmax_plan", causal), lambda: _plan(layout, causal))


def _plan(layout: SequenceLayout, causal: bool) -> Plan:
    segments = tuple(layout.segments_of(rank) for rank in range(layout.num_ranks))
    documents, rank = layout.document_bounds, layout.rank
    local, gathered = _blocks(segments[rank], documents, causal)
    reads = [_union(block for block in _blocks(held, documents, causal)[1]) for held in segments]
    return Plan(
        local=tuple(local),
        gathered=tuple(gathered),
        exchanges=any(reads),
        segments=segments[rank],
        key_span=(reads[rank][0][0], reads[rank][-1][1]) if reads[rank] else (0, 0),
        sends=tuple(
            tuple(glob for glob, _ in _held(reads[rank], segments[other])) if other != rank else ()
            for other in range(len(segments))
        ),
        receives=tuple(
            tuple(run for _, run in _held(reads[other], segments[rank])) if other != rank else ()
            for other in range(len(segments))
        ),
        owns=tuple(_held(reads[rank], segments[rank])),
    )


def _blocks(segments: tuple[Run, ...], documents: tuple[int, ...], causal: bool) -> tuple[list[Block], list[Block]]:
    """Local and gathered blocks of a rank that holds `segments`."""
    local: list[Block] = []
    gathered: list[Block] = []
    for offset, start, stop, first, last in _pieces(segments, documents):
        query = (offset, offset + stop - start)
        if causal:
            local.append(Block(*query, *query, causal=True))
            if first < start:
                gathered.append(Block(*query, first, start, causal=False))
        elif (first, last) == (start, stop):
            local.append(Block(*query, *query, causal=False))
        elif gathered and (gathered[-1].query_stop, gathered[-1].key_start) == (query[0], first):
            # A second piece of the same document, adjacent here: one block reads the keys once.
            gathered[-1] = Block(gathered[-1].query_start, query[1], first, last, causal=False)
        else:
            gathered.append(Block(*query, first, last, causal=False))
    return local, gathered


def _pieces(segments: tuple[Run, ...], documents: tuple[int, ...]) -> Iterator[tuple[int, int, int, int, int]]:
    """(local offset, global start, global stop, document's start, document's stop) of each piece, in local order."""
    offset = 0
    for start, stop in segments:
        for first, last in _documents_of(start, stop, documents):
            piece_start, piece_stop = max(start, first), min(stop, last)
            yield offset, piece_start, piece_stop, first, last
            offset += piece_stop - piece_start


def _documents_of(start: int, stop: int, documents: tuple[int, ...]) -> Iterator[Run]:
    """Bounds of the documents that have tokens in [start, stop)."""
    if start == stop:
        return
    index = bisect_right(documents, start) - 1
    while documents[index] < stop:
        yield documents[index], documents[index + 1]
        index += 1
        if index + 1 == len(documents):
            return


def _union(blocks: Iterable[Block]) -> list[Run]:
    """Sorted, disjoint runs of the keys that `blocks` read."""
    runs: list[Run] = []
    for start, stop in sorted((block.key_start, block.key_stop) for block in blocks):
        if runs and start <= runs[-1][1]:
            runs[-1] = (runs[-1][0], max(runs[-1][1], stop))
        else:
            runs.append((start, stop))
    return runs


def _held(reads: list[Run], segments: tuple[Run, ...]) -> list[tuple[Run, Run]]:
    """(global run, local run) of the tokens among `reads` that a rank with `segments` holds, in its local order."""
    held: list[tuple[Run, Run]] = []
    offset = 0
    for start, stop in segments:
        for read_start, read_stop in reads:
            first, last = max(start, read_start), min(stop, read_stop)
            if first < last:
                held.append(((first, last), (offset + first - start, offset + last - start)))
        offset += stop - start
    return held
