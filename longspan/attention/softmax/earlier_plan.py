"""Which queries travel to which rank's earlier keys, and which blocks are computed there: integers alone.

In round d, from 1 to P − 1, rank r sends queries to rank r + d and computes for those that arrive from rank r − d. A message has
only the queries that see a key of its receiver. All keys are earlier than all queries, so these are the first ones that a rank has:
those of the stretch's first document, and with a window of w tokens those less than w behind the receiver's last key.
"""

from __future__ import annotations

from dataclasses import dataclass

from longspan.layout import SequenceLayout
from longspan.layout.visibility import Run, Visibility, VisibleBlock, intersection, length, plan_blocks

PartRuns = tuple[tuple[Run, ...], ...]
"""For each rank the tokens that it keeps of one part, as positions of the sequence."""


@dataclass(frozen=True)
class PartBlocks:
    """Blocks of some queries on this rank's keys of the part number `part`."""

    part: int
    blocks: tuple[VisibleBlock, ...]


@dataclass(frozen=True)
class EarlierRound:
    """One round of one rank.

    to, num_sent: the rank that the first queries here go to, and how many. source, num_arriving: the rank that queries come from,
    and how many. parts: blocks of those that come on this rank's keys.
    """

    to: int
    num_sent: int
    source: int
    num_arriving: int
    parts: tuple[PartBlocks, ...]


@dataclass(frozen=True)
class EarlierPlan:
    """What one rank computes and exchanges. own: blocks of its own queries. rounds: those in which any rank sends anything."""

    own: tuple[PartBlocks, ...]
    rounds: tuple[EarlierRound, ...]


@dataclass(frozen=True)
class Sight:
    """What of the parts a stretch's queries see.

    queries: for each rank the tokens of the stretch whose queries attend there, in rising order. parts: of each, who keeps what.
    num_before: position of the stretch's first token in the sequence. num_seen: how many tokens before it are of its first
    document. window: as in `softmax_attention`.
    """

    queries: tuple[tuple[Run, ...], ...]
    parts: tuple[PartRuns, ...]
    num_before: int
    num_seen: int
    window: int | None


def earlier_plan(layout: SequenceLayout, sight: Sight) -> EarlierPlan:
    """The plan of this rank for a stretch, made once for its layout and what it sees."""
    return layout.cached(("softmax_earlier", sight), lambda: _plan(layout, sight))


def _plan(layout: SequenceLayout, sight: Sight) -> EarlierPlan:
    rank, num_ranks = layout.rank, layout.num_ranks
    rounds = []
    for distance in range(1, num_ranks):
        sent = [_leaving(layout, sight, other, (other + distance) % num_ranks) for other in range(num_ranks)]
        if any(sent):
            source = (rank - distance) % num_ranks
            parts = _blocks(layout, sight, sent[source], opening=True)
            to = (rank + distance) % num_ranks
            rounds.append(EarlierRound(to, length(sent[rank]), source, length(sent[source]), parts))
    own = _leaving(layout, sight, rank, rank)
    return EarlierPlan(_blocks(layout, sight, own, opening=False), tuple(rounds))


def _leaving(layout: SequenceLayout, sight: Sight, source: int, to: int) -> list[Run]:
    """The queries of `source` that see a key of `to`, as positions of the sequence: the first ones that it has."""
    seen = [(sight.num_before - sight.num_seen, sight.num_before)]
    kept = intersection([run for part in sight.parts for run in part[to]], seen)
    if not kept:
        return []
    last = sight.num_before + layout.document_bounds[1]
    if sight.window is not None:
        last = min(last, max(stop for _, stop in kept) - 1 + sight.window)
    held = [(start + sight.num_before, stop + sight.num_before) for start, stop in sight.queries[source]]
    return intersection(held, [(sight.num_before, last)])


def _blocks(layout: SequenceLayout, sight: Sight, queries: list[Run], opening: bool) -> tuple[PartBlocks, ...]:
    """Blocks of queries, which stand in a buffer in this order, on the parts of this rank."""
    document = sight.num_before - sight.num_seen, sight.num_before + layout.document_bounds[1]
    visibility = Visibility(document, True, sight.window)
    found: list[PartBlocks] = []
    for number, part in enumerate(sight.parts):
        blocks = plan_blocks(queries, part[layout.rank], visibility, opening=opening and not found)
        if blocks:
            found.append(PartBlocks(number, blocks))
    return tuple(found)
