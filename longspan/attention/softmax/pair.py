"""A softmax layer over ranks as two autograd nodes, so that what stands between write and read hides the exchange.

    write    keys and values are sent on their way: `KeyExchange.start`
    read     the queries attend, and wait for keys as they need them: `KeyExchange.attend_first`, `KeyExchange.attend_rest`

    read's backward     everything is computed, and the last gradients are sent on their way: `KeyExchange.backward`
    write's backward    waits for the gradients that other ranks owe this rank's keys, and sums: `KeyExchange.finish`

A method of exchange is one class with these functions. An object of it serves one `write_softmax` and any number of
reads. A method that attends elsewhere than where the tokens are has two more nodes, before and after the read
(`MovingExchange`): so autograd lets go of the tensors of one step before the next one allocates its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from longspan.attention.softmax.earlier import EarlierKeys
from longspan.attention.softmax.earlier_reads import EarlierReads
from longspan.attention.softmax.key_heads import KeyHeads
from longspan.attention.softmax.shapes import Shapes
from longspan.dtypes import at_least_float32
from longspan.exchange.recomputation import KeptTensors, kept_tensors
from longspan.first_order import first_order
from longspan.layout import SequenceLayout
from longspan.layout.visibility import Run, Visibility, VisibleBlock, plan_blocks
from longspan.ops.softmax.merge import Merged, QueryTile
from longspan.plan import Cluster

Grads = tuple[Tensor, Tensor]
"""dk [B, T, H_kv, D] and dv [B, T, H_kv, D_v] of this rank's tokens."""

KeyShapes = tuple[torch.Size, torch.Size]
"""The shapes of this rank's k and v."""


class KeyExchange(ABC):
    """How the queries of every rank meet the keys that they may see.

    Shapes: q [B, T, H, D], o [B, T, H, D_v]; k [B, T, H_kv, D], v [B, T, H_kv, D_v], this rank's tokens.
    """

    exchanges: bool
    """Whether any two ranks exchange anything; the same on all of them."""

    @classmethod
    def serves(cls, layout: SequenceLayout, visibility: Visibility, shapes: Shapes) -> bool:
        """Whether a choice may take it for a layer."""
        return True

    @classmethod
    def seconds(cls, layout: SequenceLayout, visibility: Visibility, shapes: Shapes, cluster: Cluster) -> float:
        """Seconds of a forward and a backward pass, of the rank that needs longest, by the cost model."""
        raise AssertionError("only methods that exchange are priced")

    @abstractmethod
    def start(self, k: Tensor, v: Tensor) -> None:
        """Send this rank's keys and values on their way."""

    def start_again(self, k: Tensor) -> None:
        """In the place of `start`, where a checkpointed function is repeated and what was brought has been kept."""
        return

    @abstractmethod
    def attend_first(self, merged: Merged, k: Tensor, v: Tensor) -> None:
        """Let every query attend to some keys, without waiting where there are any that it need not wait for."""

    @abstractmethod
    def attend_rest(self, merged: Merged, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """Let them attend to all others; returns what `backward` must be given."""

    @abstractmethod
    def backward(
        self, queries: QueryTile, kept: tuple[Tensor, ...], read: int, returns_key_grads: bool
    ) -> Grads | None:
        """dk and dv of the read number `read`: None if `finish` gives them. `queries` gathers dq.

        kept: what `attend_rest` returned. returns_key_grads: whether ranks owe each other gradients of keys, the same on all of
        them; `finish` is then called.
        """

    @abstractmethod
    def release(self) -> None:
        """Let go of what is kept for further reads: called when a read has been gone through backward.

        A read after that, if there is any, exchanges anew.
        """

    @abstractmethod
    def finish(self, shapes: KeyShapes) -> Grads:
        """dk and dv in the shapes of k and v: what the queries of all ranks gave them, summed over all reads.

        In the dtype of the keys, or the wider one that they were summed in.
        """


class MovingExchange(KeyExchange):
    """A `KeyExchange` whose queries move to where they attend, and whose outputs move back.

    Shapes: q [B, T, H, D] and o [B, T, H, D_v] of this rank's tokens; there, [B, S, h, D or D_v], all tokens in order.
    `attend_first`, `attend_rest` and `backward` are given queries, outputs and their gradients as they are there.
    """

    @abstractmethod
    def there(self, x: Tensor, phase: str) -> Tensor:
        """Queries [B, T, H, D], or gradients of outputs [B, T, H, D_v], to where they attend."""

    @abstractmethod
    def back(self, x: Tensor, phase: str) -> Tensor:
        """Outputs back to their tokens, [B, T, H, D_v]."""

    @abstractmethod
    def back_with_key_grads(self, dq: Tensor, read: int) -> Tensor:
        """Gradients of the queries of a read back to their tokens, and those of its keys and values, if any, on their way."""

    @abstractmethod
    def key_heads_of(self, rank: int, num_here: int, num_key_heads: int, device: torch.device) -> KeyHeads:
        """Which of `num_key_heads` H_kv key heads those query heads read that attend at a rank, `num_here` h of them."""

    @abstractmethod
    def query_heads_there(self, x: Tensor) -> Tensor:
        """Of numbers of the query heads [H] those of the h that attend there; differentiable."""


class Local(KeyExchange):
    """No exchange: this rank's queries see keys of this rank alone."""

    exchanges = False

    def __init__(self, layout: SequenceLayout, visibility: Visibility) -> None:
        self._blocks = own_blocks(layout, visibility)

    def start(self, k: Tensor, v: Tensor) -> None:
        raise AssertionError("nothing to send")

    def attend_first(self, merged: Merged, k: Tensor, v: Tensor) -> None:
        merged.add(self._blocks, k, v)

    def attend_rest(self, merged: Merged, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return k, v

    def backward(
        self, queries: QueryTile, kept: tuple[Tensor, ...], read: int, returns_key_grads: bool
    ) -> Grads | None:
        k, v = kept
        return queries.backward(self._blocks, k, v)

    def release(self) -> None:
        pass

    def finish(self, shapes: KeyShapes) -> Grads:
        raise AssertionError("nothing to wait for")


@dataclass(frozen=True)
class Past:
    """Keys and values of tokens before the first global one, the same on every rank; whoever sees them computes without asking.

    k: [B, L, H_kv, D]. v: [B, L, H_kv, D_v]. num_following: how many of the tokens that follow are of the same document. window:
    as in `softmax_attention`.
    """

    k: Tensor
    v: Tensor
    num_following: int
    window: int | None

    @classmethod
    def of(cls, k: Tensor, v: Tensor, layout: SequenceLayout, window: int | None) -> Past:
        """Of keys and values before the layout's tokens those that its first document goes on from."""
        if layout.continues is not None:
            first = max(0, k.shape[1] - layout.continues)
            k, v = k[:, first:], v[:, first:]
        return cls(k, v, layout.document_bounds[1], window)

    @property
    def takes_gradient(self) -> bool:
        """Whether the keys or the values do; the same on every rank."""
        return self.k.requires_grad or self.v.requires_grad

    def blocks(self, queries: Sequence[Run]) -> tuple[VisibleBlock, ...]:
        """Blocks of the queries of global runs, in ascending order, on these keys."""
        num_past = self.k.shape[1]
        # No query further on than that sees any; runs after one that is cut are cut whole.
        last = self.num_following if self.window is None else min(self.num_following, self.window - 1)
        seeing = [(start + num_past, min(stop, last) + num_past) for start, stop in queries if start < last]
        visibility = Visibility((0, num_past + self.num_following), True, self.window)
        return plan_blocks(seeing, [(0, num_past)], visibility) if num_past else ()


class KeyGrads:
    """Gradients of this rank's keys: those that its own queries gave, read by read, and those that come from other ranks."""

    def __init__(self) -> None:
        self._own: dict[int, Grads] = {}

    def keep(self, read: int, grads: Grads) -> None:
        """What the rank's own queries gave; a second backward of the same read counts in place of the first."""
        self._own[read] = grads

    def total(self) -> Grads:
        """Sum over the reads, in float32 (float64 for float64), which may be added to."""
        dk, dv = (at_least_float32(x) for x in self._own.pop(min(self._own)))
        while self._own:
            # In the order of the reads, the same on every rank.
            for x, more in zip((dk, dv), self._own.pop(min(self._own)), strict=True):
                x += more
        return dk, dv


def own_blocks(layout: SequenceLayout, visibility: Visibility) -> tuple[VisibleBlock, ...]:
    """Blocks of this rank's queries on its own keys, planned once per layout."""
    return layout.cached(
        ("softmax_own_blocks", visibility),
        lambda: plan_blocks(layout.segments, layout.segments, visibility, opening=True),
    )


class Reader:
    """The pair of nodes around an exchange."""

    def __init__(
        self,
        k: Tensor,
        v: Tensor,
        exchange: KeyExchange,
        layout: SequenceLayout,
        past: Past | None,
        earlier: EarlierKeys | None,
        window: int | None,
    ) -> None:
        self._k, self._v, self._exchange, self._past, self._layout = k, v, exchange, past, layout
        moves = isinstance(exchange, MovingExchange)
        everything = ((0, layout.seq_len),)
        queries = tuple(everything if moves else layout.segments_of(rank) for rank in range(layout.num_ranks))
        self._past_blocks = () if past is None else past.blocks(queries[layout.rank])
        self._reads: EarlierReads | None = None
        if earlier is not None and earlier.parts:
            heads_of = None
            if isinstance(exchange, MovingExchange):
                heads_of = partial(exchange.key_heads_of, num_key_heads=k.shape[2], device=k.device)
            self._reads = EarlierReads(earlier, layout, window, queries, heads_of)
        self._num_reads = 0
        self._kept: KeptTensors | None = None
        self._ticket: Tensor | None = None
        repeats = False
        if exchange.exchanges or (self._reads is not None and self._reads.exchanges):
            self._kept, repeats = kept_tensors(type(exchange).__name__, k.shape, v.shape, k.dtype)
        if exchange.exchanges:
            self._ticket = _KeysStart.apply(k, v, exchange, repeats)

    def attend(self, q: Tensor, scale: float, softcap: float | None = None, sinks: Tensor | None = None) -> Tensor:
        """Attention [B, T, H, D_v] of this rank's queries on every key that they may see, and on the sinks [H]."""
        read = self._num_reads
        self._num_reads += 1
        exchange = self._exchange
        past: tuple[Tensor | None, Tensor | None] = (None, None)
        if self._past is not None:
            past = self._past.k, self._past.v
        wants_gradient = q.requires_grad or (self._past is not None and self._past.takes_gradient)
        wants_gradient = wants_gradient or (sinks is not None and sinks.requires_grad)
        reads, earlier_ticket = self._reads, None
        if reads is not None:
            earlier_ticket = reads.earlier.ticket(self._k)
            wants_gradient = wants_gradient or earlier_ticket is not None
        if exchange.exchanges and torch.is_grad_enabled() and wants_gradient:
            assert self._ticket is not None
            if not self._ticket.requires_grad:
                # Other ranks' keys may take gradients where this rank's do not.
                self._ticket = _Join.apply(
                    self._k.new_zeros(1, requires_grad=True), exchange, (self._k.shape, self._v.shape)
                )
        ticket = self._ticket
        if isinstance(exchange, MovingExchange):
            if sinks is not None:
                sinks = exchange.query_heads_there(sinks)
            if self._past is not None:
                past_k, past_v = self._past.k, self._past.v
                rank, num_ranks = self._layout.rank, self._layout.num_ranks
                own = exchange.key_heads_of(rank, q.shape[2] // num_ranks, past_k.shape[2], past_k.device)
                past = own.take(past_k), own.take(past_v)
            q, ticket = _There.apply(q, ticket, exchange, read, self._kept)
        out: Tensor = _Attend.apply(
            q, self._k, self._v, ticket, *past, sinks, earlier_ticket, self._past_blocks, exchange, reads, scale, softcap,
            read, self._kept,
        )  # fmt: skip
        if isinstance(exchange, MovingExchange):
            out = _Back.apply(out, exchange, read, self._kept)
        return out


@dataclass(frozen=True)
class Attended:
    """Outputs, and what their backward must be given beside queries and keys of the past."""

    out: Tensor
    lse: Tensor
    kept: tuple[Tensor, ...]


def attend(
    exchange: KeyExchange,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past: tuple[Tensor | None, Tensor | None],
    past_blocks: tuple[VisibleBlock, ...],
    sinks: Tensor | None,
    scale: float,
    softcap: float | None,
    reads: EarlierReads | None = None,
) -> Attended:
    """Attention of q on the keys that `exchange` brings, on those of the past or of earlier stretches, and on sinks: one merge."""
    merged = Merged(q, scale, softcap)
    flight = None if reads is None else reads.depart(q)
    exchange.attend_first(merged, k, v)
    past_k, past_v = past
    if past_k is not None and past_v is not None:
        merged.add(past_blocks, past_k, past_v)
    if reads is not None:
        reads.attend(merged, q, v.shape[3], flight)
    kept = exchange.attend_rest(merged, k, v)
    if sinks is not None:
        merged.add_sinks(sinks)
    return Attended(merged.out, merged.lse, kept)


class _KeysStart(torch.autograd.Function):
    """First node: starts the exchange; its backward ends the exchange of gradients.

    | | shape | |
    |---|---|---|
    | k, v | [B, T, H_kv, D], [B, T, H_kv, D_v] | this rank's keys and values |
    | ticket | [1] | ties the node to `_Attend`; carries no numbers |

    Backward: dk, dv = sum over the ranks of their gradients of this rank's keys and values. `_Attend` gives k and v none, so
    that nothing is summed twice over.
    """

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, exchange: KeyExchange, repeats: bool) -> Tensor:
        ctx.exchange, ctx.shapes, ctx.dtype = exchange, (k.shape, v.shape), k.dtype
        if repeats:
            exchange.start_again(k)
        else:
            exchange.start(k, v)
        return k.new_zeros(1)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_ticket: Tensor) -> tuple[Tensor, Tensor, None, None]:
        exchange: KeyExchange = ctx.exchange
        dk, dv = exchange.finish(ctx.shapes)
        return dk.to(ctx.dtype), dv.to(ctx.dtype), None, None


class _Join(torch.autograd.Function):
    """In the place of `_KeysStart` where this rank's keys take no gradient: joins the exchange of gradients, and drops its own.

    | | shape | |
    |---|---|---|
    | leaf | [1] | takes a gradient, so that the node is in the graph |
    | ticket | [1] | as `_KeysStart`'s |
    """

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, exchange: KeyExchange, shapes: KeyShapes) -> Tensor:
        ctx.exchange, ctx.shapes = exchange, shapes
        return leaf.detach()

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_ticket: Tensor) -> tuple[None, None, None]:
        ctx.exchange.finish(ctx.shapes)
        return None, None, None


class _Attend(torch.autograd.Function):
    """Second node: attends to what arrives; its backward sends the gradients of keys and values back.

    | | shape | |
    |---|---|---|
    | q, o | [B, T, H, D], [B, T, H, D_v] | this rank's queries and outputs |
    | k, v | [B, T, H_kv, D], [B, T, H_kv, D_v] | this rank's keys and values |
    | ticket | [1], or None | from `_KeysStart`; None where no rank needs another's keys |
    | past_k, past_v | [B, L, H_kv, D], [B, L, H_kv, D_v], or None | of earlier tokens |
    | sinks | [H], or None | scores of one more key of value 0 |
    | earlier_ticket | [1], or None | from the nodes that kept the keys of earlier stretches, where these take gradients |
    | lse | [B, H, T] | log-sum-exp over all keys that a query sees, saved for backward |

    Forward: o_i = softmax_j(scale · q_i·K_j) V_j over the keys j that i sees, K and V those of all ranks and of the past. Backward:
    P = exp(scale · q Kᵀ − lse) and delta = rowsum(do ⊙ o): dV = Pᵀ do, dS = P ⊙ (do Vᵀ − delta), dq = scale · dS K,
    dK = scale · dSᵀ q; and dsinks = −Σ exp(sinks − lse) ⊙ delta. Gradients of the past and of sinks are those of this rank's
    queries alone; those of earlier stretches' keys are added where these are (`EarlierReads`). With a softcap: see
    `longspan.ops.softmax.block`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        ticket: Tensor | None,
        past_k: Tensor | None,
        past_v: Tensor | None,
        sinks: Tensor | None,
        earlier_ticket: Tensor | None,
        past_blocks: tuple[VisibleBlock, ...],
        exchange: KeyExchange,
        reads: EarlierReads | None,
        scale: float,
        softcap: float | None,
        read: int,
        kept: KeptTensors | None,
    ) -> Tensor:
        found = None if kept is None else _attended_before(kept, read, k, v)
        if found is None:
            found = attend(exchange, q, k, v, (past_k, past_v), past_blocks, sinks, scale, softcap, reads)
            if kept is not None:
                _keep_attended(kept, read, found, k, v)
        ctx.save_for_backward(q, found.out, found.lse, past_k, past_v, sinks, *found.kept)
        ctx.past_blocks, ctx.exchange, ctx.reads, ctx.read = past_blocks, exchange, reads, read
        ctx.scale, ctx.softcap = scale, softcap
        return found.out

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        exchange: KeyExchange = ctx.exchange
        returns_key_grads: bool = ctx.needs_input_grad[3]
        q, out, lse, past_k, past_v, sinks, *kept = ctx.saved_tensors
        queries = QueryTile(q, out, lse, grad_out, ctx.scale, ctx.softcap)
        reads: EarlierReads | None = ctx.reads
        flight = None if reads is None else reads.depart_backward(queries)
        key_grads = exchange.backward(queries, tuple(kept), ctx.read, returns_key_grads)
        past_grads = None if past_k is None else queries.backward(ctx.past_blocks, past_k, past_v)
        if reads is not None:
            reads.backward(queries, flight)
        # The graph holds the exchange as long as the output lives.
        exchange.release()
        dk, dv = (x.to(q.dtype) for x in key_grads) if key_grads else (None, None)
        past_dk, past_dv = (x.to(q.dtype) for x in past_grads) if past_grads else (None, None)
        ticket = grad_out.new_zeros(1) if returns_key_grads else None
        sink_grads = queries.sink_grads(sinks) if ctx.needs_input_grad[6] else None
        earlier_ticket = grad_out.new_zeros(1) if ctx.needs_input_grad[7] else None
        return queries.dq, dk, dv, ticket, past_dk, past_dv, sink_grads, earlier_ticket, *[None] * 7


class _There(torch.autograd.Function):
    """Before `_Attend`: moves queries; its backward moves their gradients back, and sends those of keys and values.

    | | shape | |
    |---|---|---|
    | q | [B, T, H, D] | queries of this rank's tokens |
    | ticket | [1] | from `_KeysStart`, passed on: where keys need gradients and queries do not, this node is in the graph by it |
    | q there | [B, S, h, D] | |
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, ticket: Tensor, exchange: MovingExchange, read: int, kept: KeptTensors | None
    ) -> tuple[Tensor, Tensor]:
        ctx.exchange, ctx.read = exchange, read
        passed_on = ticket.clone()
        if not ctx.needs_input_grad[1]:
            ctx.mark_non_differentiable(passed_on)
        return _moved(kept, ("there", read), lambda: exchange.there(q, "forward")), passed_on

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_q: Tensor, grad_ticket: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        exchange: MovingExchange = ctx.exchange
        dq = exchange.back_with_key_grads(grad_q, ctx.read)
        return dq, grad_ticket if ctx.needs_input_grad[1] else None, None, None, None


class _Back(torch.autograd.Function):
    """After `_Attend`: moves outputs [B, S, h, D_v] to their tokens, [B, T, H, D_v]; its backward moves their gradients."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, exchange: MovingExchange, read: int, kept: KeptTensors | None) -> Tensor:
        ctx.exchange = exchange
        return _moved(kept, ("back", read), lambda: exchange.back(out, "forward"))

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, None, None]:
        exchange: MovingExchange = ctx.exchange
        return exchange.there(grad_out, "backward"), None, None, None


def _keep_attended(kept: KeptTensors, read: int, found: Attended, k: Tensor, v: Tensor) -> None:
    """Keep what the first run of a checkpointed function found, but for the rank's own keys and values: they are computed again."""
    brought = [None if x is k or x is v else x for x in found.kept]
    kept.keep(("attended", read), [found.out, found.lse, *brought])


def _attended_before(kept: KeptTensors, read: int, k: Tensor, v: Tensor) -> Attended | None:
    """What the first run of a checkpointed function found in its read number `read`; None in that run."""
    again = kept.again(("attended", read))
    if again is None:
        return None
    out, lse, *brought = again
    return Attended(out, lse, tuple(own if x is None else x for x, own in zip_longest(brought, (k, v))))


def _moved(kept: KeptTensors | None, key: object, move: Callable[[], Tensor]) -> Tensor:
    """What `move` brings, or has brought in the first run of a checkpointed function."""
    again = None if kept is None else kept.again(key)
    if again is not None:
        moved: Tensor = again[0]
        return moved
    moved = move()
    if kept is not None:
        kept.keep(key, [moved])
    return moved
