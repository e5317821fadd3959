"""Keys and values brought to the queries at once (LASP-2H, arXiv 2502.07563).

Shapes: N global tokens, P ranks, T tokens of this rank, R tokens of other ranks that this rank's queries see, B batch,
H heads, H_kv key and value heads, D head dimension, D_v that of values.

    write    one collective brings K and V of other ranks, packed token by token
    read     blocks on own keys, then wait, then blocks on the R keys that arrived; merged by log-sum-exp

    read's backward     blocks on the R keys, return of dK and dV started, then blocks on own keys
    write's backward    waits for what other ranks return

The collective is an all-gather where some rank needs most of the sequence, as with a causal mask over one document. Where a
window or the documents leave every rank less than half of it, it is an all-to-all of just the tokens that are needed: with a
window, the last `window` − 1 tokens before a segment. All ranks take the same, from the layout.

The return is an all-to-all of the gradients that the mask leaves, summed where they arrive in float32, in the order of the
ranks: a reduce-scatter without the zeros (half of its bytes when causal), for shards of any length.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from longspan.attention.softmax.gathering import gathered_runs, start_gather
from longspan.attention.softmax.packing import add_packed, pack_keys, take_runs, unpack
from longspan.attention.softmax.pair import Grads, KeyExchange, KeyGrads, KeyShapes, own_blocks
from longspan.attention.softmax.shapes import Shapes, pairs_of_ranks
from longspan.comm.all_to_all import Flight, start_all_to_all
from longspan.layout import SequenceLayout, group_of
from longspan.layout.visibility import (
    Run,
    Visibility,
    VisibleBlock,
    difference,
    intersection,
    inverse_places,
    length,
    located,
    needed_keys,
    plan_blocks,
)
from longspan.ops.softmax.merge import Merged, QueryTile
from longspan.plan import Cluster

LARGEST_SHARE = 4.0
"""Gathered keys may take this many times the memory of a rank's own queries, keys, values and outputs."""


@dataclass(frozen=True)
class GatherPlan:
    """What one rank computes and exchanges: the keys it needs of others stand in its *buffer*, in global order."""

    local: tuple[VisibleBlock, ...]
    """Blocks on this rank's own keys."""
    remote: tuple[VisibleBlock, ...]
    """Blocks on the buffer."""
    exchanges: bool
    """Whether any rank needs another's keys; the same on all of them."""
    gathers: bool
    """All-gather (True) or all-to-all of what is needed; the same on all ranks."""
    arrivals: tuple[Run, ...]
    """The runs of what arrives that make the buffer, in its order."""
    departures: tuple[tuple[Run, ...], ...]
    """For each rank, the local runs that it needs, in the order of its buffer; none for this rank."""
    returns: tuple[tuple[Run, ...], ...]
    """For each rank, where the tokens that it holds stand in the buffer; none for this rank."""

    @property
    def num_arriving(self) -> tuple[int, ...]:
        """Number of tokens that this rank needs of each rank."""
        return tuple(length(runs) for runs in self.returns)

    @property
    def num_departing(self) -> tuple[int, ...]:
        """Number of this rank's tokens that each rank needs."""
        return tuple(length(runs) for runs in self.departures)


def gather_plan(layout: SequenceLayout, visibility: Visibility) -> GatherPlan:
    """The plan of this rank, made once per layout."""
    return layout.cached(("softmax_gather", visibility), lambda: _plan_gather(layout, visibility))


def remote_keys(layout: SequenceLayout, visibility: Visibility) -> list[list[Run]]:
    """For each rank, the global runs of keys that its queries see and other ranks hold; made once per layout."""

    def build() -> list[list[Run]]:
        held = [layout.segments_of(rank) for rank in range(layout.num_ranks)]
        return [difference(needed_keys(own, visibility), own) for own in held]

    return layout.cached(("softmax_remote_keys", visibility), build)


def _plan_gather(layout: SequenceLayout, visibility: Visibility) -> GatherPlan:
    ranks, rank = range(layout.num_ranks), layout.rank
    held = [layout.segments_of(other) for other in ranks]
    needs = remote_keys(layout, visibility)
    buffer = needs[rank]
    longest = max(layout.tokens_of)
    gathers = 2 * max(map(length, needs)) > (layout.num_ranks - 1) * longest
    returns = [located(intersection(buffer, own), buffer) for own in held]
    if gathers:
        arrivals = located(buffer, gathered_runs(held, longest))
    else:
        arrivals = inverse_places([run for runs in returns for run in runs])
    return GatherPlan(
        local=own_blocks(layout, visibility),
        remote=plan_blocks(held[rank], buffer, visibility),
        exchanges=any(needs),
        gathers=gathers,
        arrivals=tuple(arrivals),
        departures=tuple(tuple(located(need, held[rank])) for need in needs),
        returns=tuple(map(tuple, returns)),
    )


class AllGatherKeys(KeyExchange):
    """The collectives of one layer: what brings the keys in its forward, what returns their gradients in its backward."""

    @classmethod
    def serves(cls, layout: SequenceLayout, visibility: Visibility, shapes: Shapes) -> bool:
        """Whether what is gathered fits in memory beside what a rank keeps anyway (`LARGEST_SHARE`)."""
        return gathered_share(layout, visibility, shapes) <= LARGEST_SHARE

    @classmethod
    def seconds(cls, layout: SequenceLayout, visibility: Visibility, shapes: Shapes, cluster: Cluster) -> float:
        """max(own blocks, keys that arrive) + the other blocks, forward and backward; two collectives.

        Own blocks are those of a rank's queries with its own keys: they need nothing of the collective, and hide it.
        """
        held = [layout.segments_of(rank) for rank in range(layout.num_ranks)]
        own = [sum(block.num_pairs for block in plan_blocks(runs, runs, visibility)) for runs in held]
        pairs = pairs_of_ranks(layout, visibility)
        needs = [length(need) for need in remote_keys(layout, visibility)]
        gathered = (layout.num_ranks - 1) * max(layout.tokens_of)
        gathers = gather_plan(layout, visibility).gathers
        one_pair, link = shapes.pair_seconds(cluster), cluster.slowest
        returned = link.bytes_seconds(max(needs) * shapes.key_bytes)
        longest = 0.0
        for all_pairs, own_pairs, need in zip(pairs, own, needs, strict=True):
            brought = link.bytes_seconds((gathered if gathers else need) * shapes.key_bytes)
            local, remote = own_pairs * one_pair, (all_pairs - own_pairs) * one_pair
            longest = max(longest, max(4 * local, brought) + max(10 * local, returned) + 14 * remote)
        return longest + 2 * link.latency

    def __init__(self, layout: SequenceLayout, visibility: Visibility) -> None:
        self._layout = layout
        self._plan = gather_plan(layout, visibility)
        self.exchanges = self._plan.exchanges
        self._arriving: Flight | None = None
        self._buffer: Tensor | None = None
        self._returning: dict[int, Flight] = {}
        self._grads = KeyGrads()

    def start(self, k: Tensor, v: Tensor) -> None:
        layout, plan = self._layout, self._plan
        if plan.gathers:
            self._arriving = start_gather(k, v, max(layout.tokens_of), layout, "keys and values")
        else:
            mine = pack_keys(k, v, [run for runs in plan.departures for run in runs])
            self._arriving = start_all_to_all(mine, plan.num_departing, plan.num_arriving, group_of(layout), "forward")

    def attend_first(self, merged: Merged, k: Tensor, v: Tensor) -> None:
        merged.add(self._plan.local, k, v)

    def attend_rest(self, merged: Merged, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        buffer = self._wait_buffer(k, v)
        merged.add(self._plan.remote, *unpack(buffer, k, v))
        return k, v, buffer

    def _wait_buffer(self, k: Tensor, v: Tensor) -> Tensor:
        """The keys and values that this rank needs of others, packed: R tokens."""
        if self._buffer is None:
            if self._arriving is None:
                self.start(k, v)
            assert self._arriving is not None
            self._buffer = take_runs(self._arriving.wait(), self._plan.arrivals)
            self._arriving = None
        return self._buffer

    def release(self) -> None:
        self._buffer = None

    def backward(
        self, queries: QueryTile, kept: tuple[Tensor, ...], read: int, returns_key_grads: bool
    ) -> Grads | None:
        k, v, buffer = kept
        plan = self._plan
        grads = queries.backward(plan.remote, *unpack(buffer, k, v))
        if returns_key_grads:
            mine = pack_keys(grads[0].to(k.dtype), grads[1].to(k.dtype), [run for runs in plan.returns for run in runs])
            self._returning[read] = start_all_to_all(
                mine, plan.num_arriving, plan.num_departing, group_of(self._layout), "backward"
            )
        # They are on their way: the blocks below need the memory.
        del grads
        own = queries.backward(plan.local, k, v)
        if returns_key_grads:
            self._grads.keep(read, own)
        return None

    def finish(self, shapes: KeyShapes) -> Grads:
        total = self._grads.total()
        departed = [run for runs in self._plan.departures for run in runs]
        while self._returning:
            # In the order of the reads, the same on every rank.
            add_packed(total, departed, self._returning.pop(min(self._returning)).wait())
        return total


def gathered_share(layout: SequenceLayout, visibility: Visibility, shapes: Shapes) -> float:
    """Memory of the keys that the neediest rank gathers, as a multiple of that of its own q, k, v and o."""
    most = max(map(length, remote_keys(layout, visibility)))
    own = max(layout.tokens_of) * (shapes.num_heads + shapes.num_key_heads)
    return most * shapes.num_key_heads / own
