"""The queries of a stretch travel to the keys of earlier stretches, and what they found there travels back.

Shapes: P ranks, T tokens of this rank, n of its first queries, B batch, H query heads, H_kv key and value heads, D head dimension,
D_v that of values; where `ulysses` has moved the queries, T is the whole stretch and H this rank's heads.

    forward     own queries on own parts; then for each round: n queries go to a rank, those of another come, are attended to
                on every part here, and go back as outputs and log-sum-exps, which their rank merges with what it has
    backward    the same with q, o, log-sum-exp and ∂o; what comes back is ∂q. ∂k and ∂v stay here: they are added to the parts'

Earlier keys do not move. There may be any number of them, and a stretch has a fixed number of queries: what a rank holds beside its
own is a few messages of n queries, whatever the method that exchanges the keys of the stretch itself. (In the forward pass of
prompts that is "pass-Q", arXiv 2411.01783.) A part that lies in host memory is copied to the device for each round, one ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from longspan.attention.softmax.earlier import EarlierKeys, KeyPart
from longspan.attention.softmax.earlier_plan import EarlierRound, PartBlocks, Sight, earlier_plan
from longspan.attention.softmax.host_memory import one_ahead
from longspan.attention.softmax.key_heads import KeyHeads
from longspan.attention.softmax.messages import Message, Part
from longspan.comm.all_to_all import Flight, start_all_to_all
from longspan.dtypes import accumulation_dtype
from longspan.layout import SequenceLayout, group_of
from longspan.layout.visibility import Run
from longspan.ops.softmax.merge import Merged, QueryTile

Take = Callable[[int], Sequence[Tensor]]
"""The tensors of a message for so many of the first queries."""


class EarlierReads:
    """How the queries of one stretch read the parts of earlier ones, any number of times."""

    def __init__(
        self,
        earlier: EarlierKeys,
        layout: SequenceLayout,
        window: int | None,
        queries: Sequence[Sequence[Run]],
        heads_of: Callable[[int, int], KeyHeads] | None,
    ) -> None:
        """
        Args:
            queries: for each rank the tokens whose queries attend there, in rising order.
            heads_of: the key heads that are read by the query heads that attend at a rank, which is given with their number; None
                is all.
        """
        self.earlier, self._layout, self._heads_of = earlier, layout, heads_of
        parts = tuple(part.runs for part in earlier.parts)
        places = tuple(tuple(runs) for runs in queries)
        sight = Sight(places, parts, earlier.num_tokens, earlier.num_seen(layout), window)
        self._plan = earlier_plan(layout, sight)

    @property
    def exchanges(self) -> bool:
        """Whether any two ranks exchange queries; the same on all of them."""
        return bool(self._plan.rounds)

    def depart(self, q: Tensor) -> Flight | None:
        """The queries [B, T, H, D] of the first round leave."""
        return self._leave(0, _queries(q), lambda n: (q[:, :n],), "forward")

    def attend(self, merged: Merged, q: Tensor, value_dim: int, flight: Flight | None) -> None:
        """Let the queries of `merged` attend to all parts, whoever holds them; flight: what `depart` returned."""
        self._attend(merged, self._plan.own, self._layout.rank)
        asked, answer = _queries(q), _found(q, value_dim)
        returning: tuple[int, Flight] | None = None
        for number, this in enumerate(self._plan.rounds):
            assert flight is not None
            (arrived,) = asked.unpack(flight.wait(), this.num_arriving)
            flight = self._leave(number + 1, asked, lambda n: (q[:, :n],), "forward")
            there = merged.others(arrived)
            self._attend(there, this.parts, this.source)
            back = self._return(this, answer, there.found if this.num_arriving else (), "forward")
            self._merge(merged, answer, returning)
            returning = this.num_sent, back
        self._merge(merged, answer, returning)

    def depart_backward(self, queries: QueryTile) -> Flight | None:
        """What backward needs of the queries of the first round leaves."""
        return self._leave(0, _with_grads(queries), queries.first, "backward")

    def backward(self, queries: QueryTile, flight: Flight | None) -> None:
        """Give the parts their gradients, and `queries` those of the queries; flight: what `depart_backward` returned."""
        self._give(queries, self._plan.own, self._layout.rank)
        asked, answer = _with_grads(queries), _grads(queries)
        returning: tuple[int, Flight] | None = None
        for number, this in enumerate(self._plan.rounds):
            assert flight is not None
            there = queries.others(*asked.unpack(flight.wait(), this.num_arriving))
            flight = self._leave(number + 1, asked, queries.first, "backward")
            self._give(there, this.parts, this.source)
            back = self._return(this, answer, (there.summed_dq,), "backward")
            self._add(queries, answer, returning)
            returning = this.num_sent, back
        self._add(queries, answer, returning)

    def _attend(self, merged: Merged, parts: Sequence[PartBlocks], rank: int) -> None:
        """Let queries of `rank` attend to the parts here."""
        heads = self._heads(rank, merged.num_heads)
        for coming in one_ahead(parts, lambda x: (x.blocks, self._part(x).fetch(with_grads=False))):
            blocks, (k, v) = coming[0], coming[1].wait()
            merged.add(blocks, heads.take(k), heads.take(v))
            # Gone before the one after the next is begun.
            del coming, k, v

    def _give(self, queries: QueryTile, parts: Sequence[PartBlocks], rank: int) -> None:
        """Add what queries of `rank` give to the gradients of the parts, and to theirs."""
        takes = self.earlier.takes_gradient
        heads = self._heads(rank, queries.num_heads)
        for coming in one_ahead(parts, lambda x: (x, self._part(x).fetch(with_grads=takes))):
            planned, (k, v, *sums) = coming[0], coming[1].wait()
            grads = queries.backward(planned.blocks, heads.take(k), heads.take(v))
            if takes:
                for total, grad in zip(sums, grads, strict=True):
                    heads.add(total, grad)
                self._part(planned).keep_grads(sums[0], sums[1])
            # Gone before the one after the next is begun.
            del coming, k, v, sums, grads

    def _heads(self, rank: int, num_here: int) -> KeyHeads:
        if self._heads_of is None:
            return KeyHeads(0, self.earlier.parts[0].k.shape[2])
        return self._heads_of(rank, num_here)

    def _part(self, planned: PartBlocks) -> KeyPart:
        return self.earlier.parts[planned.part]

    def _leave(self, number: int, message: Message, take: Take, phase: str) -> Flight | None:
        """Queries leave in round `number`, counted from 0, if there is one."""
        if number >= len(self._plan.rounds):
            return None
        this = self._plan.rounds[number]
        tensors = take(this.num_sent)
        return self._send(message, tensors, this.to, this.num_sent, this.source, this.num_arriving, phase)

    def _return(self, this: EarlierRound, message: Message, tensors: Sequence[Tensor], phase: str) -> Flight:
        """What queries that came found here goes back."""
        return self._send(message, tensors, this.source, this.num_arriving, this.to, this.num_sent, phase)

    def _send(
        self,
        message: Message,
        tensors: Sequence[Tensor],
        to: int,
        num_sent: int,
        source: int,
        num_arriving: int,
        phase: str,
    ) -> Flight:
        sizes, arriving = [0] * self._layout.num_ranks, [0] * self._layout.num_ranks
        sizes[to], arriving[source] = message.num_bytes(num_sent), message.num_bytes(num_arriving)
        sent = message.pack(tensors, num_sent) if num_sent else message.nothing(self.earlier.parts[0].device)
        return start_all_to_all(sent, sizes, arriving, group_of(self._layout), phase, name="queries")

    def _merge(self, merged: Merged, message: Message, returning: tuple[int, Flight] | None) -> None:
        if returning is not None and returning[0]:
            out, lse = message.unpack(returning[1].wait(), returning[0])
            merged.add_found(out, lse)
        elif returning is not None:
            returning[1].wait()

    def _add(self, queries: QueryTile, message: Message, returning: tuple[int, Flight] | None) -> None:
        if returning is not None:
            (dq,) = message.unpack(returning[1].wait(), returning[0])
            if returning[0]:
                queries.add_dq(dq)


def _queries(q: Tensor) -> Message:
    return Message((_like(q),))


def _found(q: Tensor, value_dim: int) -> Message:
    rows, _, heads, _ = q.shape
    return Message((Part((rows,), (heads, value_dim), q.dtype), Part((rows, heads), (), accumulation_dtype(q.dtype))))


def _with_grads(queries: QueryTile) -> Message:
    q, out, lse, grad_out = queries.first(0)
    return Message((_like(q), _like(out), Part(tuple(lse.shape[:2]), (), lse.dtype), _like(grad_out)))


def _grads(queries: QueryTile) -> Message:
    q = queries.first(0)[0]
    return Message((Part((q.shape[0],), tuple(q.shape[2:]), accumulation_dtype(q.dtype)),))


def _like(x: Tensor) -> Part:
    return Part((x.shape[0],), tuple(x.shape[2:]), x.dtype)
