"""A softmax layer over ranks as two autograd nodes, so that what stands between write and read hides the exchange.

    write    keys and values are sent on their way: `KeyExchange.start`
    read     the queries attend, and wait for keys as they need them: `KeyExchange.attend`

    read's backward     everything is computed, and the last gradients are sent on their way: `KeyExchange.backward`
    write's backward    waits for the gradients that other ranks owe this rank's keys, and sums: `KeyExchange.finish`

A method of exchange is one class with these four functions. An object of it serves one `write_softmax` and any number of
reads. A method that attends elsewhere than where the tokens are has two more nodes, before and after the read
(`MovingExchange`): so autograd lets go of the tensors of one step before the next one allocates its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from longspan.first_order import first_order
from longspan.layout import SequenceLayout
from longspan.layout.visibility import Visibility, VisibleBlock, plan_blocks
from longspan.ops.softmax.merge import Merged, QueryTile

Grads = tuple[Tensor, Tensor]
"""dk and dv of this rank's tokens, [B, T, H_kv, D]."""


class KeyExchange(ABC):
    """How the queries of every rank meet the keys that they may see.

    Shapes: q, o [B, T, H, D]; k, v [B, T, H_kv, D], this rank's tokens.
    """

    exchanges: bool
    """Whether any two ranks exchange anything; the same on all of them."""

    @abstractmethod
    def start(self, k: Tensor, v: Tensor) -> None:
        """Send this rank's keys and values on their way."""

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The output o, and what `backward` must be given."""

    @abstractmethod
    def backward(
        self, grad_out: Tensor, saved: tuple[Tensor, ...], scale: float, read: int, returns_key_grads: bool
    ) -> tuple[Tensor, Grads | None]:
        """dq of the read number `read`, and its dk and dv: None if `finish` gives them.

        returns_key_grads: whether ranks owe each other gradients of keys, the same on all of them; `finish` is then called.
        """

    @abstractmethod
    def release(self) -> None:
        """Let go of what is kept for further reads: called when a read has been gone through backward.

        A read after that, if there is any, exchanges anew.
        """

    @abstractmethod
    def finish(self, shape: torch.Size) -> Grads:
        """dk and dv of a shape [B, T, H_kv, D]: what the queries of all ranks gave them, summed over all reads.

        In the dtype of the keys, or the wider one that they were summed in.
        """


class MovingExchange(KeyExchange):
    """A `KeyExchange` whose queries move to where they attend, and whose outputs move back.

    Shapes: q, o [B, T, H, D] of this rank's tokens; there, [B, S, h, D]. `attend` and `backward` are given queries, outputs and
    their gradients as they are there.
    """

    @abstractmethod
    def there(self, x: Tensor, phase: str) -> Tensor:
        """Queries, or gradients of outputs, [B, T, H, D] to where they attend."""

    @abstractmethod
    def back(self, x: Tensor, phase: str) -> Tensor:
        """Outputs back to their tokens, [B, T, H, D]."""

    @abstractmethod
    def back_with_key_grads(self, dq: Tensor, read: int) -> Tensor:
        """Gradients of the queries of a read back to their tokens, and those of its keys and values, if any, on their way."""


class Local(KeyExchange):
    """No exchange: this rank's queries see keys of this rank alone."""

    exchanges = False

    def __init__(self, layout: SequenceLayout, visibility: Visibility) -> None:
        self._blocks = own_blocks(layout, visibility)

    def start(self, k: Tensor, v: Tensor) -> None:
        raise AssertionError("nothing to send")

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, tuple[Tensor, ...]]:
        merged = Merged(q)
        merged.add(self._blocks, k, v, scale)
        out = merged.out
        return out, (q, k, v, out, merged.lse)

    def backward(
        self, grad_out: Tensor, saved: tuple[Tensor, ...], scale: float, read: int, returns_key_grads: bool
    ) -> tuple[Tensor, Grads | None]:
        q, k, v, out, lse = saved
        queries = QueryTile(q, out, lse, grad_out, scale)
        key_grads = queries.backward(self._blocks, k, v)
        return queries.dq, key_grads

    def release(self) -> None:
        pass

    def finish(self, shape: torch.Size) -> Grads:
        raise AssertionError("nothing to wait for")


class KeyGrads:
    """Gradients of this rank's keys: those that its own queries gave, read by read, and those that come from other ranks."""

    def __init__(self) -> None:
        self._own: dict[int, Grads] = {}

    def keep(self, read: int, grads: Grads) -> None:
        """What the rank's own queries gave; a second backward of the same read counts in place of the first."""
        self._own[read] = grads

    def total(self) -> Grads:
        """Sum over the reads, in float32 (float64 for float64), which may be added to."""
        dk, dv = (wide(x) for x in self._own.pop(min(self._own)))
        while self._own:
            # In the order of the reads, the same on every rank.
            for x, more in zip((dk, dv), self._own.pop(min(self._own)), strict=True):
                x += more
        return dk, dv


def wide(x: Tensor) -> Tensor:
    """In the dtype that sums are taken in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def own_blocks(layout: SequenceLayout, visibility: Visibility) -> tuple[VisibleBlock, ...]:
    """Blocks of this rank's queries on its own keys, planned once a layout."""
    return layout.cached(
        ("softmax_own_blocks", visibility),
        lambda: plan_blocks(layout.segments, layout.segments, visibility, opening=True),
    )


class Reader:
    """The pair of nodes around an exchange."""

    def __init__(self, k: Tensor, v: Tensor, exchange: KeyExchange) -> None:
        self._k, self._v, self._exchange = k, v, exchange
        self._num_reads = 0
        self._ticket: Tensor | None = _Start.apply(k, v, exchange) if exchange.exchanges else None

    def attend(self, q: Tensor, scale: float) -> Tensor:
        """Attention [B, T, H, D] of this rank's queries on every key that they may see."""
        read = self._num_reads
        self._num_reads += 1
        exchange = self._exchange
        if exchange.exchanges and torch.is_grad_enabled() and q.requires_grad:
            assert self._ticket is not None
            if not self._ticket.requires_grad:
                # Other ranks' keys may take gradients where this rank's do not.
                self._ticket = _Join.apply(self._k.new_zeros(1, requires_grad=True), exchange, self._k.shape)
        if not isinstance(exchange, MovingExchange):
            out: Tensor = _Attend.apply(q, self._k, self._v, self._ticket, exchange, scale, read)
            return out
        q_there, ticket = _There.apply(q, self._ticket, exchange, read)
        moved: Tensor = _Attend.apply(q_there, self._k, self._v, ticket, exchange, scale, read)
        back: Tensor = _Back.apply(moved, exchange)
        return back


class _Start(torch.autograd.Function):
    """First node: starts the exchange; its backward ends the exchange of gradients.

    | | shape | |
    |---|---|---|
    | k, v | [B, T, H_kv, D] | this rank's keys and values |
    | ticket | [1] | ties the node to `_Attend`; carries no numbers |

    Backward: dk, dv = sum over the ranks of their gradients of this rank's keys and values. `_Attend` gives k and v none, so
    that nothing is summed twice over.
    """

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, exchange: KeyExchange) -> Tensor:
        ctx.exchange, ctx.shape, ctx.dtype = exchange, k.shape, k.dtype
        exchange.start(k, v)
        return k.new_zeros(1)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_ticket: Tensor) -> tuple[Tensor, Tensor, None]:
        exchange: KeyExchange = ctx.exchange
        dk, dv = exchange.finish(ctx.shape)
        return dk.to(ctx.dtype), dv.to(ctx.dtype), None


class _Join(torch.autograd.Function):
    """In the place of `_Start` where this rank's keys take no gradient: joins the exchange of gradients, and drops its own.

    | | shape | |
    |---|---|---|
    | leaf | [1] | takes a gradient, so that the node is in the graph |
    | ticket | [1] | as `_Start`'s |
    """

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, exchange: KeyExchange, shape: torch.Size) -> Tensor:
        ctx.exchange, ctx.shape = exchange, shape
        return leaf.detach()

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_ticket: Tensor) -> tuple[None, None, None]:
        ctx.exchange.finish(ctx.shape)
        return None, None, None


class _Attend(torch.autograd.Function):
    """Second node: attends to what arrives; its backward sends the gradients of keys and values back.

    | | shape | |
    |---|---|---|
    | q, o | [B, T, H, D] | this rank's queries and outputs |
    | k, v | [B, T, H_kv, D] | this rank's keys and values |
    | ticket | [1], or None | from `_Start`; None where no rank needs another's keys |
    | lse | [B, H, T] | log-sum-exp over all keys that a query sees, saved for backward |

    Forward: o_i = softmax_j(scale · q_i·K_j) V_j over the keys j that i sees, K and V those of all ranks. Backward:
    P = exp(scale · q Kᵀ − lse) and delta = rowsum(do ⊙ o): dV = Pᵀ do, dS = P ⊙ (do Vᵀ − delta), dq = scale · dS K,
    dK = scale · dSᵀ q.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, ticket: Tensor | None, exchange: KeyExchange, scale: float, read: int
    ) -> Tensor:
        out, saved = exchange.attend(q, k, v, scale)
        ctx.save_for_backward(*saved)
        ctx.exchange, ctx.scale, ctx.read = exchange, scale, read
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        exchange: KeyExchange = ctx.exchange
        returns_key_grads: bool = ctx.needs_input_grad[3]
        dq, key_grads = exchange.backward(grad_out, ctx.saved_tensors, ctx.scale, ctx.read, returns_key_grads)
        # The graph holds the exchange as long as the output lives.
        exchange.release()
        dk, dv = (x.to(dq.dtype) for x in key_grads) if key_grads else (None, None)
        return dq, dk, dv, grad_out.new_zeros(1) if returns_key_grads else None, None, None, None


class _There(torch.autograd.Function):
    """Before `_Attend`: moves queries; its backward moves their gradients back, and sends those of keys and values.

    | | shape | |
    |---|---|---|
    | q | [B, T, H, D] | queries of this rank's tokens |
    | ticket | [1] | from `_Start`, passed on: where keys need gradients and queries do not, this node is in the graph by it |
    | q there | [B, S, h, D] | |
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, ticket: Tensor, exchange: MovingExchange, read: int) -> tuple[Tensor, Tensor]:
        ctx.exchange, ctx.read = exchange, read
        passed_on = ticket.clone()
        if not ctx.needs_input_grad[1]:
            ctx.mark_non_differentiable(passed_on)
        return exchange.there(q, "forward"), passed_on

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_q: Tensor, grad_ticket: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        exchange: MovingExchange = ctx.exchange
        dq = exchange.back_with_key_grads(grad_q, ctx.read)
        return dq, grad_ticket if ctx.needs_input_grad[1] else None, None, None


class _Back(torch.autograd.Function):
    """After `_Attend`: moves outputs [B, S, h, D] to their tokens, [B, T, H, D]; its backward moves their gradients."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, exchange: MovingExchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.back(out, "forward")

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None]:
        exchange: MovingExchange = ctx.exchange
        return exchange.there(grad_out, "backward"), None
