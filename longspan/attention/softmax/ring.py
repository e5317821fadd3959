"""Ring attention (arXiv 2310.01889): keys and values travel from rank to rank while the queries attend to the last arrivals.

Shapes: P ranks, T tokens of this rank, L tokens of a message, B batch, H heads, H_kv key and value heads, D head dimension, D_v
that of values.

In round d, rank r has the keys of rank r − d. It passes them on to rank r + 1 and attends to them meanwhile. Backward, the same
journey again, and behind the keys their gradients: each rank adds its share and passes the sum on, the last one sends it home.
A rank never holds more than its own keys, those it attends to and those on their way.

Each message has only the tokens that a rank further on needs, so a journey ends at the last rank that sees anything of its keys,
and a token leaves it where nobody further on sees it. Gradients are those of the tokens that were seen so far. All ranks know
all journeys from the layout. Keys travel in their own dtype, gradients in float32 (float64 for float64): they are summed on the
way.

    write    keys of round 1 leave
    read     blocks on own keys; then for each round: wait, pass on, blocks on what arrived; merged by log-sum-exp

    read's backward     the same with gradients; those of the last round leave
    write's backward    waits for the gradients that come home
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor

from longspan.attention.softmax.all_gather import remote_keys
from longspan.attention.softmax.packing import add_packed, pack_into, pack_keys, take_runs, unpack
from longspan.attention.softmax.pair import Grads, KeyExchange, KeyGrads, KeyShapes, own_blocks
from longspan.attention.softmax.shapes import Shapes, pairs_of_ranks
from longspan.comm.all_to_all import Flight, start_all_to_all
from longspan.dtypes import accumulation_dtype
from longspan.layout import SequenceLayout, group_of
from longspan.layout.visibility import Run, Visibility, VisibleBlock, length, located, plan_blocks, union
from longspan.ops.softmax.merge import Merged, QueryTile
from longspan.plan import Cluster


@dataclass(frozen=True)
class Journey:
    """The way of one rank's keys: tokens as runs of that rank's local positions, one entry a hop.

    Hop number d is from the rank d − 1 places further to the one d places further.
    """

    seen: tuple[tuple[Run, ...], ...]
    """What the rank at the end of the hop sees."""
    keys: tuple[tuple[Run, ...], ...]
    """What the message of keys has: all that is seen at this hop or later."""
    grads: tuple[tuple[Run, ...], ...]
    """What the message of gradients that leaves after the hop has: all that was seen at this hop or before."""

    @property
    def num_hops(self) -> int:
        """Number of hops up to the last rank that sees anything."""
        return len(self.keys)


@dataclass(frozen=True)
class Round:
    """What one rank does in round d, with the keys of the rank d places before it."""

    blocks: tuple[VisibleBlock, ...]
    """Blocks of this rank's queries on the message of keys."""
    leaving: tuple[Run, ...]
    """The tokens that leave for the next rank when the round begins: runs of the keys in hand, those of the round before.

    Before the first round, the keys in hand are this rank's own.
    """
    num_arriving: int
    """Number of tokens of keys that arrive from the rank before."""
    seen_in_keys: tuple[Run, ...]
    """Where the tokens that these queries see stand in the message of keys."""
    seen_in_grads: tuple[Run, ...]
    """Where they stand in the message of gradients."""
    before_in_grads: tuple[Run, ...]
    """Where the tokens that were seen by ranks before stand in the message of gradients."""
    num_grads: int
    """Number of tokens of the message of gradients."""
    grads_to: int
    """Who gets it: the next rank, or the rank that holds the keys."""
    num_passing: int
    """Number of tokens of gradients that the rank before passes on in this round, for the next round here."""
    comes_home_from: int | None
    """The rank from which the gradients of this rank's own keys arrive in this round."""


@dataclass(frozen=True)
class RingPlan:
    """What one rank computes and exchanges."""

    local: tuple[VisibleBlock, ...]
    rounds: tuple[Round, ...]
    own: Journey
    """The journey of this rank's keys."""


def journeys(layout: SequenceLayout, visibility: Visibility) -> list[Journey]:
    """The journey of each rank's keys, the same on every rank; made once per layout."""
    return layout.cached(
        ("softmax_journeys", visibility),
        lambda: [_journey(layout, remote_keys(layout, visibility), source) for source in range(layout.num_ranks)],
    )


def _journey(layout: SequenceLayout, needs: list[list[Run]], source: int) -> Journey:
    held = layout.segments_of(source)
    seen: list[tuple[Run, ...]] = []
    for distance in range(1, layout.num_ranks):
        seen.append(tuple(union(located(needs[(source + distance) % layout.num_ranks], held))))
    while seen and not seen[-1]:
        seen.pop()
    later = accumulate(reversed(seen), _together)
    return Journey(seen=tuple(seen), keys=tuple(later)[::-1], grads=tuple(accumulate(seen, _together)))


def _together(left: tuple[Run, ...], right: tuple[Run, ...]) -> tuple[Run, ...]:
    return tuple(union([*left, *right]))


def ring_plan(layout: SequenceLayout, visibility: Visibility) -> RingPlan:
    """The plan of this rank, made once per layout."""
    return layout.cached(("softmax_ring", visibility), lambda: _plan_ring(layout, visibility))


def _plan_ring(layout: SequenceLayout, visibility: Visibility) -> RingPlan:
    ways = journeys(layout, visibility)
    num_rounds = max(way.num_hops for way in ways)
    return RingPlan(
        local=own_blocks(layout, visibility),
        rounds=tuple(_round(layout, visibility, ways, number) for number in range(1, num_rounds + 1)),
        own=ways[layout.rank],
    )


def _round(layout: SequenceLayout, visibility: Visibility, ways: list[Journey], number: int) -> Round:
    rank, num_ranks = layout.rank, layout.num_ranks
    hop = number - 1
    source = (rank - number) % num_ranks
    own, here, in_hand, behind = ways[rank], ways[source], ways[source + 1 - num_ranks], ways[source - 1]
    keys, grads, seen, before = (
        (here.keys[hop], here.grads[hop], here.seen[hop], here.grads[hop - 1] if hop else ())
        if number <= here.num_hops
        else ((), (), (), ())
    )
    leaving = in_hand.keys[hop] if number <= in_hand.num_hops else ()
    if leaving and hop:
        leaving = tuple(located(leaving, in_hand.keys[hop - 1]))
    return Round(
        blocks=plan_blocks(layout.segments, _global(keys, layout.segments_of(source)), visibility),
        leaving=leaving,
        num_arriving=length(keys),
        seen_in_keys=tuple(located(seen, keys)),
        seen_in_grads=tuple(located(seen, grads)),
        before_in_grads=tuple(located(before, grads)),
        num_grads=length(grads),
        grads_to=source if number == here.num_hops else (rank + 1) % num_ranks,
        num_passing=length(behind.grads[hop]) if number < behind.num_hops else 0,
        comes_home_from=(rank + number) % num_ranks if number == own.num_hops else None,
    )


def _global(runs: Sequence[Run], held: Sequence[Run]) -> list[Run]:
    """Local runs of a rank that holds the global runs `held`, as global runs."""
    found = []
    offset = 0
    for start, stop in held:
        for first, last in runs:
            a, b = max(first, offset), min(last, offset + stop - start)
            if a < b:
                found.append((start + a - offset, start + b - offset))
        offset += stop - start
    return found


class RingKeys(KeyExchange):
    """The rounds of one layer."""

    @classmethod
    def seconds(cls, layout: SequenceLayout, visibility: Visibility, shapes: Shapes, cluster: Cluster) -> float:
        """max(all blocks, keys and gradients that arrive), and the latency of every round.

        Keys come by twice, and as many gradients of keys once, in float32 at least.
        """
        ways = journeys(layout, visibility)
        size = (2 * shapes.element_size + max(4, shapes.element_size)) / shapes.element_size
        arriving = 0.0
        for rank in range(layout.num_ranks):
            hops = [(ways[rank - hop - 1], hop) for hop in range(layout.num_ranks - 1)]
            keys = sum(length(way.keys[hop]) for way, hop in hops if hop < way.num_hops)
            arriving = max(arriving, keys * shapes.key_bytes * size)
        rounds = 3 * max(way.num_hops for way in ways)
        blocks = 14 * shapes.pair_seconds(cluster) * max(pairs_of_ranks(layout, visibility))
        return max(blocks, cluster.slowest.bytes_seconds(arriving)) + rounds * cluster.slowest.latency

    def __init__(self, layout: SequenceLayout, visibility: Visibility) -> None:
        self._layout = layout
        self._plan = ring_plan(layout, visibility)
        self.exchanges = bool(self._plan.rounds)
        self._started: Flight | None = None
        self._homecoming: dict[int, _Grads] = {}
        self._grads = KeyGrads()

    def start(self, k: Tensor, v: Tensor) -> None:
        self._started = self._depart(k, v, "forward")

    def attend_first(self, merged: Merged, k: Tensor, v: Tensor) -> None:
        # A second read sends the keys around once more.
        self._started = self._started or self._depart(k, v, "forward")
        merged.add(self._plan.local, k, v)

    def attend_rest(self, merged: Merged, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        flight, self._started = self._started, None
        for number, this in enumerate(self._plan.rounds):
            assert flight is not None
            keys = flight.wait()
            if number + 1 < len(self._plan.rounds):
                flight = self._pass_on(keys, number + 1, "forward")
            merged.add(this.blocks, *unpack(keys, k, v))
        return k, v

    def backward(
        self, queries: QueryTile, kept: tuple[Tensor, ...], read: int, returns_key_grads: bool
    ) -> Grads | None:
        k, v = kept
        flight = self._depart(k, v, "backward")
        own = queries.backward(self._plan.local, k, v)
        grads = _Grads(self._layout, self._plan)
        for number, this in enumerate(self._plan.rounds):
            keys = flight.wait()
            if number + 1 < len(self._plan.rounds):
                flight = self._pass_on(keys, number + 1, "backward")
            share = queries.backward(this.blocks, *unpack(keys, k, v))
            if returns_key_grads:
                grads.pass_on(number, keys, share)
        if returns_key_grads:
            self._homecoming[read] = grads
            self._grads.keep(read, own)
        return None

    def release(self) -> None:
        # Keys are sent around anew for every read.
        pass

    def finish(self, shapes: KeyShapes) -> Grads:
        total = self._grads.total()
        while self._homecoming:
            # In the order of the reads, the same on every rank.
            self._homecoming.pop(min(self._homecoming)).add_home(total)
        return total

    def _depart(self, k: Tensor, v: Tensor, phase: str) -> Flight:
        """This rank's keys leave."""
        return self._send(pack_keys(k, v, self._plan.rounds[0].leaving), 0, phase)

    def _pass_on(self, keys: Tensor, number: int, phase: str) -> Flight:
        """The keys in hand leave in round `number`, counted from 0, as far as they are needed."""
        return self._send(take_runs(keys, self._plan.rounds[number].leaving), number, phase)

    def _send(self, leaving: Tensor, number: int, phase: str) -> Flight:
        rank, num_ranks = self._layout.rank, self._layout.num_ranks
        sizes, arriving = [0] * num_ranks, [0] * num_ranks
        sizes[(rank + 1) % num_ranks] = leaving.shape[0]
        arriving[rank - 1] = self._plan.rounds[number].num_arriving
        return start_all_to_all(leaving, sizes, arriving, group_of(self._layout), phase)


class _Grads:
    """The gradients of one backward pass, on their way behind the keys."""

    def __init__(self, layout: SequenceLayout, plan: RingPlan) -> None:
        self._layout, self._plan = layout, plan
        self._flight: Flight | None = None
        self._sizes: list[int] = []
        self._home_from: int | None = None
        self._home: Tensor | None = None

    def pass_on(self, number: int, keys: Tensor, share: tuple[Tensor, Tensor]) -> None:
        """Add this rank's share, dk and dv of the keys in hand, to what came in the round before, and send the sum on."""
        this = self._plan.rounds[number]
        dtype = accumulation_dtype(keys.dtype)
        everything = ((0, this.num_grads),)
        if this.seen_in_keys == this.seen_in_grads == everything:
            mine = keys.new_empty((this.num_grads, *keys.shape[1:]), dtype=dtype)
            pack_into(mine, *share, everything)
        else:
            mine = keys.new_zeros((this.num_grads, *keys.shape[1:]), dtype=dtype)
            for total, grad in zip(unpack(mine, *share), share, strict=True):
                rows = take_runs(grad.transpose(0, 1), this.seen_in_keys)
                _add(total.transpose(0, 1), this.seen_in_grads, rows)
        before = self._wait()
        if before is not None:
            _add(mine, this.before_in_grads, before)
        rank, num_ranks = self._layout.rank, self._layout.num_ranks
        sizes, arriving = [0] * num_ranks, [0] * num_ranks
        sizes[this.grads_to] = this.num_grads
        arriving[rank - 1] = this.num_passing
        if this.comes_home_from is not None:
            arriving[this.comes_home_from] += length(self._plan.own.grads[-1])
        self._sizes, self._home_from = arriving, this.comes_home_from
        self._flight = start_all_to_all(mine, sizes, arriving, group_of(self._layout), "backward")

    def add_home(self, total: Grads) -> None:
        """Wait for the last round, and add what came home to the gradients of this rank's tokens."""
        self._wait()
        if self._home is not None:
            add_packed(total, self._plan.own.grads[-1], self._home)

    def _wait(self) -> Tensor | None:
        """The gradients that the rank before has passed on in the last round; keeps those that came home."""
        if self._flight is None:
            return None
        arrived = self._flight.wait().split(self._sizes)
        self._flight = None
        if self._home_from is not None:
            self._home = arrived[self._home_from]
        before = self._layout.rank - 1
        return None if self._home_from == before % self._layout.num_ranks else arrived[before]


def _add(total: Tensor, runs: Sequence[Run], rows: Tensor) -> None:
    """Add rows, one run after another, to the runs of `total`."""
    offset = 0
    for start, stop in runs:
        total[start:stop] += rows[offset : offset + stop - start]
        offset += stop - start
