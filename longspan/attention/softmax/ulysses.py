"""Ulysses (arXiv 2309.14509): an all-to-all gives each rank the whole sequence of some heads, and one gives the outputs back.

Shapes: N global tokens, P ranks, T tokens of this rank, B batch, H query heads, h = H / P of them per rank, H_kv key and value
heads, n of them at this rank, D head dimension, D_v that of values.

    write    all-to-all of keys and values: T tokens of all heads to N tokens of this rank's heads
    read     all-to-all of queries, blocks on the whole sequence, all-to-all of outputs

    read's backward     all-to-all of output gradients, blocks, all-to-alls of dK, dV (started) and dQ
    write's backward    waits for dK and dV

Rank r has the query heads r · h to (r + 1) · h, and the key and value heads that these read: H_kv / P of them; where there are
fewer key heads than ranks, some ranks have the same ones and their gradients are summed. Every rank does the same work whatever
the order of the layout, the mask and the documents.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.attention.softmax.all_gather import remote_keys
from longspan.attention.softmax.key_heads import KeyHeads, spread, summed
from longspan.attention.softmax.packing import pack_into, packed_width, take_runs, unpack
from longspan.attention.softmax.pair import Grads, KeyShapes, MovingExchange
from longspan.attention.softmax.shapes import Shapes, pairs_of_ranks
from longspan.comm.all_to_all import Flight, start_all_to_all
from longspan.dtypes import at_least_float32
from longspan.layout import SequenceLayout, group_of
from longspan.layout.visibility import Run, Visibility, VisibleBlock, inverse_places, plan_blocks, touches
from longspan.ops.softmax.block import near_keys
from longspan.ops.softmax.merge import Merged, QueryTile
from longspan.plan import Cluster


def key_heads_of(rank: int, num_ranks: int, num_key_heads: int) -> Run:
    """The key and value heads that the query heads of `rank` read, as [start, stop)."""
    return rank * num_key_heads // num_ranks, -(-(rank + 1) * num_key_heads // num_ranks)


@dataclass(frozen=True)
class UlyssesPlan:
    """What the ranks compute and how tokens are ordered; the same on every rank."""

    exchanges: bool
    """Whether any rank sees another's keys."""
    blocks: tuple[VisibleBlock, ...]
    """Blocks of the whole sequence on itself."""
    to_sequence: tuple[Run, ...]
    """The runs of the ranks' tokens, laid rank by rank, that make the sequence."""
    to_ranks: tuple[Run, ...]
    """The runs of the sequence that make the ranks' tokens, rank by rank."""


def ulysses_plan(layout: SequenceLayout, visibility: Visibility) -> UlyssesPlan:
    """The plan, made once per layout."""
    return layout.cached(("softmax_ulysses", visibility), lambda: _plan_ulysses(layout, visibility))


def _plan_ulysses(layout: SequenceLayout, visibility: Visibility) -> UlyssesPlan:
    by_rank = [run for rank in range(layout.num_ranks) for run in layout.segments_of(rank)]
    sequence = [(0, layout.seq_len)]
    return UlyssesPlan(
        exchanges=any(remote_keys(layout, visibility)),
        blocks=plan_blocks(sequence, sequence, visibility, opening=True),
        to_sequence=tuple(inverse_places(by_rank)),
        to_ranks=tuple(by_rank),
    )


class Ulysses(MovingExchange):
    """The all-to-alls of one layer."""

    @classmethod
    def serves(cls, layout: SequenceLayout, visibility: Visibility, shapes: Shapes) -> bool:
        """Whether each rank gets an equal number of query heads."""
        return shapes.num_heads % layout.num_ranks == 0

    @classmethod
    def seconds(cls, layout: SequenceLayout, visibility: Visibility, shapes: Shapes, cluster: Cluster) -> float:
        """1/P of all blocks, and all its bytes: nothing hides them; seven collectives."""
        num_ranks = layout.num_ranks
        # A key head that several ranks' query heads share goes to each of them.
        copies = max(1.0, num_ranks / shapes.num_key_heads)
        tokens = max(layout.tokens_of) * (num_ranks - 1) / num_ranks
        arriving = 2 * tokens * (shapes.key_bytes * copies + shapes.query_bytes)
        blocks = 14 * shapes.pair_seconds(cluster) * sum(pairs_of_ranks(layout, visibility)) / num_ranks
        return blocks + cluster.slowest.bytes_seconds(arriving) + 7 * cluster.slowest.latency

    def __init__(self, layout: SequenceLayout, visibility: Visibility) -> None:
        self._layout = layout
        self._plan = ulysses_plan(layout, visibility)
        self.exchanges = self._plan.exchanges
        self._arriving: Flight | None = None
        self._keys: tuple[Tensor, Tensor] | None = None
        self._key_grads: dict[int, list[Tensor]] = {}
        self._returning: dict[int, list[Flight]] = {}
        self._num_key_heads = 0

    def start_again(self, k: Tensor) -> None:
        self._num_key_heads = k.shape[2]

    def start(self, k: Tensor, v: Tensor) -> None:
        rows, num_tokens, self._num_key_heads, _ = k.shape
        parts = [(k[:, :, start:stop], v[:, :, start:stop]) for start, stop in self._heads_of(k.shape[2])]
        sizes = [num_tokens * rows * packed_width(*part) for part in parts]
        sent = k.new_empty(sum(sizes))
        for packed, part in zip(sent.split(sizes), parts, strict=True):
            pack_into(packed.view(num_tokens, rows, -1), *part, [(0, num_tokens)])
        arriving = [num * sizes[self._layout.rank] // num_tokens for num in self._layout.tokens_of]
        self._arriving = start_all_to_all(sent, sizes, arriving, group_of(self._layout), "forward")

    def there(self, x: Tensor, phase: str) -> Tensor:
        return self._wait_heads(self._to_heads(x, phase))

    def back(self, x: Tensor, phase: str) -> Tensor:
        return self._wait_tokens(self._to_tokens(x, phase))

    def key_heads_of(self, rank: int, num_here: int, num_key_heads: int, device: torch.device) -> KeyHeads:
        sources = self._key_heads(num_here, num_key_heads, device, rank)
        return KeyHeads(*key_heads_of(rank, self._layout.num_ranks, num_key_heads), sources)

    def query_heads_there(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (self._layout.num_ranks, -1))[self._layout.rank]

    def attend_first(self, merged: Merged, k: Tensor, v: Tensor) -> None:
        keys, values = self._wait_keys(k, v)
        sources = self._key_heads(merged.num_heads, self._num_key_heads, k.device)
        merged.add(self._plan.blocks, spread(keys, sources), spread(values, sources))

    def attend_rest(self, merged: Merged, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return self._wait_keys(k, v)

    def backward(
        self, queries: QueryTile, kept: tuple[Tensor, ...], read: int, returns_key_grads: bool
    ) -> Grads | None:
        keys, values = kept
        sources = self._key_heads(queries.num_heads, self._num_key_heads, keys.device)
        grads = queries.backward(self._plan.blocks, spread(keys, sources), spread(values, sources))
        if returns_key_grads:
            pairs = zip(grads, kept, strict=True)
            self._key_grads[read] = [summed(grad, sources, x).to(keys.dtype) for grad, x in pairs]
        return None

    def back_with_key_grads(self, dq: Tensor, read: int) -> Tensor:
        flight = self._to_tokens(dq, "backward")
        if read in self._key_grads:
            grads = self._key_grads.pop(read)
            # What comes back needs the memory of the output's gradient, and dv that of dk.
            self._returning[read] = []
            while grads:
                self._returning[read].append(self._return(grads.pop(0)))
        return self._wait_tokens(flight)

    def finish(self, shapes: KeyShapes) -> Grads:
        dk, dv = self._wait_key_grads(shapes)
        while self._returning:
            more = self._wait_key_grads(shapes)
            dk, dv = (at_least_float32(x) + y for x, y in zip((dk, dv), more, strict=True))
        return dk, dv

    def release(self) -> None:
        self._keys = None

    def _heads_of(self, num_heads: int) -> list[Run]:
        num_ranks = self._layout.num_ranks
        return [key_heads_of(rank, num_ranks, num_heads) for rank in range(num_ranks)]

    def _wait_keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [B, N, n, D] and values [B, N, n, D_v] of the whole sequence."""
        if self._keys is None:
            if self._arriving is None:
                self.start(k, v)
            assert self._arriving is not None
            start, stop = self._heads_of(k.shape[2])[self._layout.rank]
            arrived = self._arriving.wait().view(self._layout.seq_len, k.shape[0], -1)
            packed = take_runs(arrived, self._plan.to_sequence)
            k, v = unpack(packed, k[:, :, start:stop], v[:, :, start:stop])
            self._keys = near_keys(k), near_keys(v)
            self._arriving = None
        return self._keys

    def _return(self, grad: Tensor) -> Flight:
        """dk [B, N, n, D] or dv [B, N, n, D_v] of the sequence on its way to the ranks that hold its tokens."""
        sent = take_runs(grad.transpose(0, 1), self._plan.to_ranks).contiguous()
        numbers, own = sent[0].numel(), self._layout.num_local_tokens
        heads = self._heads_of(self._num_key_heads)
        arriving = [own * numbers // grad.shape[2] * (stop - start) for start, stop in heads]
        sizes = [num * numbers for num in self._layout.tokens_of]
        return start_all_to_all(sent.flatten(), sizes, arriving, group_of(self._layout), "backward")

    def _wait_key_grads(self, shapes: KeyShapes) -> list[Tensor]:
        """dk and dv, in the shapes of k and v, of the first read whose are on their way: the same one on every rank.

        Key heads that several ranks have are summed in float32 (float64 for float64), in the order of the ranks.
        """
        flights = self._returning.pop(min(self._returning))
        return [self._gathered(flight.wait(), shape) for flight, shape in zip(flights, shapes, strict=True)]

    def _gathered(self, arrived: Tensor, shape: torch.Size) -> Tensor:
        rows, num_tokens, num_heads, dim = shape
        heads = self._heads_of(num_heads)
        parts = [
            part.view(num_tokens, rows, -1, dim).transpose(0, 1)
            for part in arrived.split([num_tokens * rows * (stop - start) * dim for start, stop in heads])
        ]
        if touches(heads):
            return torch.cat(parts, dim=2)
        total = at_least_float32(arrived.new_zeros(shape))
        for part, (start, stop) in zip(parts, heads, strict=True):
            total[:, :, start:stop] += part
        return total

    def _key_heads(self, here: int, num_key_heads: int, device: torch.device, rank: int | None = None) -> Tensor | None:
        """For each of `here` query heads of a rank (None: this one) its key head's number there; None where kernels group so."""
        rank, num_ranks = self._layout.rank if rank is None else rank, self._layout.num_ranks
        group = here * num_ranks // num_key_heads
        first, last = key_heads_of(rank, num_ranks, num_key_heads)
        sources = [(rank * here + head) // group - first for head in range(here)]
        if here % (last - first) == 0 and sources == [head // (here // (last - first)) for head in range(here)]:
            return None
        key = "softmax_key_heads", rank, here, num_key_heads, device
        return self._layout.cached(key, lambda: torch.tensor(sources).to(device))

    def _to_heads(self, x: Tensor, phase: str) -> Flight:
        """[B, T, H, D or D_v] of this rank's tokens, to all tokens of the ranks' heads."""
        num_ranks = self._layout.num_ranks
        rows, num_tokens, num_heads, dim = x.shape
        sent = x.new_empty((num_ranks, num_tokens, rows, num_heads // num_ranks, dim))
        sent.copy_(x.unflatten(2, (num_ranks, -1)).permute(2, 1, 0, 3, 4))
        return start_all_to_all(
            sent.flatten(0, 1), [num_tokens] * num_ranks, self._layout.tokens_of, group_of(self._layout), phase
        )

    def _wait_heads(self, flight: Flight) -> Tensor:
        """[B, N, h, D or D_v]"""
        return take_runs(flight.wait(), self._plan.to_sequence).transpose(0, 1)

    def _to_tokens(self, x: Tensor, phase: str) -> Flight:
        """[B, N, h, D or D_v] of this rank's heads, to all heads of the ranks' tokens."""
        num_ranks, num_tokens = self._layout.num_ranks, self._layout.num_local_tokens
        sent = take_runs(x.transpose(0, 1), self._plan.to_ranks).contiguous()
        return start_all_to_all(sent, self._layout.tokens_of, [num_tokens] * num_ranks, group_of(self._layout), phase)

    def _wait_tokens(self, flight: Flight) -> Tensor:
        """[B, T, H, D or D_v]"""
        arrived = flight.wait().unflatten(0, (self._layout.num_ranks, -1))
        return arrived.permute(2, 1, 0, 3, 4).flatten(2, 3)
