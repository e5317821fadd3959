"""The halo: the last `width` tokens before each segment, sent point to point by the ranks that hold them.

Shapes: B batch rows, T tokens of this rank, C channels, n segments of this rank.

A short convolution of W taps reads W − 1 tokens before each of its own. Who needs which token of whom follows from the layout:
it is decided on the host, the same on every rank, so that messages carry tokens alone. A segment takes its halo from as many
segments as it needs (segments may be shorter than the halo, or empty), never from before the start of its first token's
document, and copies what its own rank holds (with zigzag, the last rank holds two segments in a row). Between two ranks there
is at most one message each way.

    start    x      -> a ticket        messages launched
      ... what needs no halo ...
    wait     ticket -> the halo        waits

and backward the same in reverse: the wait node sends the gradients of the halo back to the owners of the tokens, the start
node waits for those of its own tokens. A rank sends B · C numbers for each of its tokens that another rank's segment takes, and
backward as many for each that it took.

The messages are those of one all-to-all whose parts are empty but between ranks that exchange tokens: NCCL makes sends and
receives of just these. Unlike a batch of sends and receives it needs no communicator to be there already on ranks that
have none, it keeps every rank's count of operations equal (on gloo, TORCH_DISTRIBUTED_DEBUG=DETAIL takes unequal counts for
an error), and on gloo it is faster.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longspan.comm.all_to_all import Flight, start_all_to_all
from longspan.errors import LayoutError
from longspan.exchange.recomputation import KeptTensors, kept_tensors
from longspan.first_order import first_order
from longspan.layout import SequenceLayout, group_of


@dataclass(frozen=True)
class Fetch:
    """A run of tokens that one segment's halo takes from an earlier segment.

    source_rank holds them at its local rows ``[source_start, source_stop)``; they are the slots ``[start, stop)`` of the halo of
    `rank`'s segment number `segment`.
    """

    source_rank: int
    source_start: int
    source_stop: int
    rank: int
    segment: int
    start: int
    stop: int

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class HaloPlan:
    """What one rank sends, receives and copies for the halos of `width` tokens.

    sends, receives: by the other rank, in the order in which the tokens stand in the message. copies: what it holds itself.
    exchanges: whether any two ranks of the layout exchange tokens.
    """

    width: int
    sends: Mapping[int, tuple[Fetch, ...]]
    receives: Mapping[int, tuple[Fetch, ...]]
    copies: tuple[Fetch, ...]
    exchanges: bool

    @property
    def is_empty(self) -> bool:
        """True where no two ranks exchange tokens, and this one copies none: then `start_halo` has nothing to do."""
        return not (self.exchanges or self.copies)


def halo_plan(layout: SequenceLayout, width: int) -> HaloPlan:
    """What this rank sends, receives and copies; made once for a layout."""
    return layout.cached(("halo", width), lambda: _plan_halo(layout, width))


def _plan_halo(layout: SequenceLayout, width: int) -> HaloPlan:
    sends: dict[int, list[Fetch]] = {}
    receives: dict[int, list[Fetch]] = {}
    copies: list[Fetch] = []
    exchanges = False
    for fetch in _fetches(layout, width):
        exchanges = exchanges or fetch.rank != fetch.source_rank
        if fetch.rank == layout.rank:
            if fetch.source_rank == layout.rank:
                copies.append(fetch)
            else:
                receives.setdefault(fetch.source_rank, []).append(fetch)
        elif fetch.source_rank == layout.rank:
            sends.setdefault(fetch.rank, []).append(fetch)
    return HaloPlan(
        width=width,
        sends={peer: tuple(sends[peer]) for peer in sorted(sends)},
        receives={peer: tuple(receives[peer]) for peer in sorted(receives)},
        copies=tuple(copies),
        exchanges=exchanges,
    )


def _fetches(layout: SequenceLayout, width: int) -> list[Fetch]:
    """Every fetch of every rank, in one order that all ranks agree on."""
    segments, bounds = layout.all_segments, layout.document_bounds
    first_length = {segment.rank: segment.num_tokens for segment in segments if segment.slot == 0}
    fetches = []
    for index, segment in enumerate(segments):
        if segment.num_tokens == 0:
            continue
        document_start = bounds[bisect_right(bounds, segment.start) - 1]
        oldest = max(document_start, segment.start - width)
        while index > 0 and oldest < segments[index].start:
            index -= 1
            source = segments[index]
            start = max(oldest, source.start)
            if start < source.stop:
                local = (first_length[source.rank] if source.slot else 0) - source.start
                slot = width - segment.start
                fetches.append(
                    Fetch(
                        source_rank=source.rank,
                        source_start=local + start,
                        source_stop=local + source.stop,
                        rank=segment.rank,
                        segment=segment.slot,
                        start=slot + start,
                        stop=slot + source.stop,
                    )
                )
    return fetches


class _Messages:
    """Messages under way: the tokens of some runs to some ranks, and room for what comes back, ``[tokens, B, C]`` by rank."""

    def __init__(
        self,
        outgoing: Mapping[int, Sequence[Tensor]],
        incoming: Mapping[int, tuple[Fetch, ...]],
        like: Tensor,
        plan: HaloPlan,
        layout: SequenceLayout,
        phase: str,
    ) -> None:
        """outgoing: by rank, runs ``[B, tokens, C]``. incoming: by rank, what it sends. like: ``[B, ?, C]``, for the dtype."""
        self._incoming = [fetch for fetches in incoming.values() for fetch in fetches]
        runs = [run.transpose(0, 1) for parts in outgoing.values() for run in parts]
        sent = torch.cat(runs) if runs else like.new_empty(0, like.shape[0], like.shape[2])
        self._flight: Flight | None = None
        if plan.exchanges:
            send_sizes = [sum(run.shape[1] for run in outgoing.get(rank, ())) for rank in range(layout.num_ranks)]
            receive_sizes = [_num_tokens(incoming.get(rank, ())) for rank in range(layout.num_ranks)]
            self._flight = start_all_to_all(sent, send_sizes, receive_sizes, group_of(layout), phase, name="halo")

    def wait(self) -> list[tuple[Fetch, Tensor]]:
        """What arrived: each fetch and its tokens ``[B, tokens, C]``."""
        if self._flight is None:
            return []
        parts = self._flight.wait().split([fetch.num_tokens for fetch in self._incoming])
        return [(fetch, part.transpose(0, 1)) for fetch, part in zip(self._incoming, parts, strict=True)]


def _num_tokens(fetches: Sequence[Fetch]) -> int:
    return sum(fetch.num_tokens for fetch in fetches)


@dataclass
class _HaloLink:
    """What the two nodes of one halo hand to each other."""

    plan: HaloPlan
    layout: SequenceLayout
    adds_in_place: bool
    kept: KeptTensors | None = None
    repeats: bool = False
    forward: _Messages | None = None
    copied: list[Tensor] | None = None
    reverse: _Messages | None = None
    grad_copied: list[Tensor] | None = None


class _HaloStart(torch.autograd.Function):
    """Sends the tokens that other segments need; in backward, waits for their gradients.

    | | shape | |
    |---|---|---|
    | x | [B, T, C] | this rank's tokens; returned as it is |
    | joins | [] or None | a leaf, where x takes no gradient but other ranks' may |
    | ticket | [] | ties the two nodes together; carries no value |

    Backward: dx += dh of every halo slot that took the token.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, joins: Tensor | None, link: _HaloLink) -> tuple[Tensor, Tensor]:
        ctx.link, ctx.shape = link, x.shape
        ctx.set_materialize_grads(False)
        plan = link.plan
        if link.repeats:
            return x, x.new_zeros(())
        outgoing = {
            peer: [x[:, fetch.source_start : fetch.source_stop] for fetch in fetches]
            for peer, fetches in plan.sends.items()
        }
        link.copied = [x[:, fetch.source_start : fetch.source_stop].clone() for fetch in plan.copies]
        link.forward = _Messages(outgoing, plan.receives, x, plan, link.layout, "forward")
        return x, x.new_zeros(())

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_x: Tensor | None, grad_ticket: Tensor | None) -> tuple[Tensor, None, None]:
        link: _HaloLink = ctx.link
        assert link.reverse is not None and link.grad_copied is not None and grad_ticket is not None
        if grad_x is None:
            grad_x = grad_ticket.new_zeros(ctx.shape)
        elif not link.adds_in_place:
            grad_x = grad_x.clone(memory_format=torch.contiguous_format)
        arrived = [*zip(link.plan.copies, link.grad_copied, strict=True), *link.reverse.wait()]
        for fetch, grad in arrived:
            grad_x[:, fetch.source_start : fetch.source_stop] += grad
        link.reverse = link.grad_copied = None
        return grad_x, None, None


class _HaloWait(torch.autograd.Function):
    """Waits for the halo; in backward, sends its gradient to where the tokens came from.

    | | shape | |
    |---|---|---|
    | ticket | [] | from the start node |
    | h | [n, B, width, C] | the tokens before each of this rank's segments, the nearest last; zero where there is none |

    Backward: sends dh and does not wait for what comes back.
    """

    @staticmethod
    def forward(ctx: Any, ticket: Tensor, link: _HaloLink, shape: torch.Size) -> Tensor:
        ctx.link = link
        again = link.kept.again("halo") if link.kept is not None else None
        if again is not None:
            kept: Tensor = again[0]
            return kept
        plan, messages, copied = link.plan, link.forward, link.copied
        assert messages is not None and copied is not None
        halo = ticket.new_zeros(link.layout.num_segments, shape[0], plan.width, shape[2])
        for fetch, tokens in [*zip(plan.copies, copied, strict=True), *messages.wait()]:
            halo[fetch.segment, :, fetch.start : fetch.stop] = tokens
        link.forward = link.copied = None
        if link.kept is not None:
            link.kept.keep("halo", [halo])
        return halo

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_halo: Tensor) -> tuple[Tensor, None, None]:
        link: _HaloLink = ctx.link
        plan = link.plan
        outgoing = {
            peer: [grad_halo[fetch.segment, :, fetch.start : fetch.stop] for fetch in fetches]
            for peer, fetches in plan.receives.items()
        }
        link.grad_copied = [grad_halo[fetch.segment, :, fetch.start : fetch.stop] for fetch in plan.copies]
        link.reverse = _Messages(outgoing, plan.sends, grad_halo[0], plan, link.layout, "backward")
        return grad_halo.new_zeros(()), None, None


@dataclass(frozen=True)
class PendingHalo:
    """A halo that has been started and not yet waited for.

    x: ``[B, T, C]``, the tokens, for what needs no halo. Use these, and not the tensor that was given to `start_halo`:
    gradients that arrive from other ranks are then added to theirs in place, without another pass over all tokens.
    """

    x: Tensor
    _ticket: Tensor
    _link: _HaloLink

    def wait(self) -> Tensor:
        """The tokens before each of this rank's segments, ``[n, B, width, C]``; differentiable; to be called once.

        The nearest token is the last; slots before the start of the document, or of the sequence, are zero.
        """
        halo: Tensor = _HaloWait.apply(self._ticket, self._link, self.x.shape)
        return halo


def start_halo(
    x: Tensor, layout: SequenceLayout, width: int, *, adds_in_place: bool = False, joins: bool = False
) -> PendingHalo:
    """Start fetching the `width` tokens before each of this rank's segments, without waiting.

    Args:
        x: ``[B, T, C]``, this rank's tokens; the same B, C and dtype on every rank.
        layout: who holds which tokens.
        width: number of tokens, at least 1.
        adds_in_place: backward adds to the gradient of `PendingHalo.x` in place. Only where that goes to a single autograd
            Function, which makes a tensor of its own for the gradient.
        joins: take part in the backward exchange even if x takes no gradient here, because that of other ranks may.

    Raises:
        LayoutError: for a layout of several ranks without a process group.

    Every rank takes part, unless no two ranks exchange tokens. A rank whose plan is not empty must use the halo in its result,
    even if it receives no token: the gradients of the tokens that it sent come back through it.
    """
    if layout.num_ranks > 1 and layout.group is None:
        raise LayoutError(
            "a layout made by for_rank() is for planning and has no process group to send tokens in. "
            "Build it as SequenceLayout(seq_len, group)"
        )
    plan = halo_plan(layout, width)
    kept, repeats = kept_tensors("halo", width, x.shape, x.dtype) if plan.exchanges else (None, False)
    link = _HaloLink(plan, layout, adds_in_place, kept, repeats)
    leaf = x.new_zeros((), requires_grad=True) if joins and not x.requires_grad else None
    tokens, ticket = _HaloStart.apply(x, leaf, link)
    return PendingHalo(tokens, ticket, link)
