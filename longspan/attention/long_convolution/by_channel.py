"""All tokens of some channels: one all-to-all gives each rank the whole sequence of its channels, and another gives it back.

Shapes: B batch rows, T tokens of this rank, S tokens of the sequence, C channels, c channels of this rank: from r · C / P to
(r + 1) · C / P of P ranks, rounded down, so that C need not be divisible, and some ranks may have none.

A rank sends T · B · (C − c) numbers and receives (S − T) · B · c, each way. Start and wait are two nodes: what is computed in
between hides the way there, and its backward the way of the gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longspan.comm.all_to_all import Flight, start_all_to_all
from longspan.first_order import first_order
from longspan.layout import SequenceLayout, group_of
from longspan.layout.rows import index_of


def channels_of(rank: int, layout: SequenceLayout, num_channels: int) -> range:
    """The channels of which `rank` gets all tokens."""
    num_ranks = layout.num_ranks
    return range(rank * num_channels // num_ranks, (rank + 1) * num_channels // num_ranks)


@dataclass
class _Trip:
    """A way of tokens, and of their gradients back. there: from this rank's tokens to its channels, and not the other way round."""

    there: bool
    layout: SequenceLayout
    num_channels: int
    forward: Flight | None = None
    reverse: Flight | None = None

    def start(self, x: Tensor, there: bool, phase: str) -> Flight:
        layout, batch = self.layout, x.shape[0]
        ranges = [channels_of(rank, layout, self.num_channels) for rank in range(layout.num_ranks)]
        own = len(ranges[layout.rank])
        of_channels = [layout.num_local_tokens * batch * len(channels) for channels in ranges]
        of_tokens = [num_tokens * batch * own for num_tokens in layout.tokens_of]
        rows = x.transpose(0, 1)
        if there:
            sent = x.new_empty(sum(of_channels))
            for part, channels in zip(sent.split(of_channels), ranges, strict=True):
                own_rows = rows[..., channels.start : channels.stop]
                part.view(own_rows.shape).copy_(own_rows)
            return start_all_to_all(sent, of_channels, of_tokens, group_of(layout), phase, name="long_conv1d")
        order = _orders(layout, x.device)[1]
        sent = (rows if order is None else rows.index_select(0, order)).reshape(-1)
        return start_all_to_all(sent, of_tokens, of_channels, group_of(layout), phase, name="long_conv1d")

    def finish(self, flight: Flight, there: bool, batch: int) -> Tensor:
        layout = self.layout
        arrived = flight.wait()
        ranges = [channels_of(rank, layout, self.num_channels) for rank in range(layout.num_ranks)]
        if there:
            rows = arrived.view(layout.seq_len, batch, len(ranges[layout.rank]))
            order = _orders(layout, arrived.device)[0]
            return (rows if order is None else rows.index_select(0, order)).transpose(0, 1)
        num_tokens = layout.num_local_tokens
        parts = arrived.split([num_tokens * batch * len(channels) for channels in ranges])
        by_rank = zip(parts, ranges, strict=True)
        return torch.cat([part.view(num_tokens, batch, len(channels)) for part, channels in by_rank], -1).transpose(
            0, 1
        )


def _orders(layout: SequenceLayout, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """Which rows of the ranks' tokens, laid one rank after another, make the sequence, and the inverse; None if they lie so."""

    def build() -> tuple[Tensor | None, Tensor | None]:
        runs = [run for rank in range(layout.num_ranks) for run in layout.segments_of(rank)]
        positions = torch.cat([torch.arange(start, stop) for start, stop in runs])
        if bool((positions == torch.arange(layout.seq_len)).all()):
            return None, None
        return index_of(positions.argsort().tolist(), device), positions.to(device)

    return layout.cached(("tokens of channels", device), build)


class _Start(torch.autograd.Function):
    """Sends tokens on their way; in backward, waits for their gradients.

    | | shape | |
    |---|---|---|
    | x | [B, T, C], or [B, S, c] on the way back | |
    | joins | [] or None | a leaf, where x takes no gradient but other ranks' may |
    | ticket | [] | ties the two nodes together; carries no value |
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, joins: Tensor | None, trip: _Trip) -> Tensor:
        ctx.trip, ctx.batch = trip, x.shape[0]
        trip.forward = trip.start(x, trip.there, "forward")
        return x.new_zeros(())

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        trip: _Trip = ctx.trip
        assert trip.reverse is not None
        grad_x = trip.finish(trip.reverse, not trip.there, ctx.batch)
        trip.reverse = None
        return grad_x if ctx.needs_input_grad[0] else None, None, None


class _Wait(torch.autograd.Function):
    """Waits for the tokens; in backward, sends their gradients on their way.

    | | shape | |
    |---|---|---|
    | ticket | [] | from the start node |
    | y | [B, S, c], or [B, T, C] on the way back | |
    """

    @staticmethod
    def forward(ctx: Any, ticket: Tensor, trip: _Trip, batch: int) -> Tensor:
        ctx.trip = trip
        assert trip.forward is not None
        flight, trip.forward = trip.forward, None
        return trip.finish(flight, trip.there, batch)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        trip: _Trip = ctx.trip
        trip.reverse = trip.start(grads[0], not trip.there, "backward")
        return grads[0].new_zeros(()), None, None


@dataclass(frozen=True)
class PendingChannels:
    """Tokens on their way to the ranks of their channels."""

    _ticket: Tensor
    _trip: _Trip
    _batch: int

    def wait(self) -> Tensor:
        """All tokens of this rank's channels, ``[B, S, c]``, in order; differentiable; to be called once."""
        arrived: Tensor = _Wait.apply(self._ticket, self._trip, self._batch)
        return arrived


def start_to_channels(x: Tensor, layout: SequenceLayout, joins: bool) -> PendingChannels:
    """Start giving each rank all tokens of its channels of x ``[B, T, C]``, without waiting.

    joins: take part in the backward exchange even if x takes no gradient here, because that of other ranks may.
    """
    trip = _Trip(True, layout, x.shape[2])
    leaf = x.new_zeros((), requires_grad=True) if joins and not x.requires_grad else None
    return PendingChannels(_Start.apply(x, leaf, trip), trip, x.shape[0])


def to_tokens(y: Tensor, num_channels: int, layout: SequenceLayout) -> Tensor:
    """All channels of this rank's tokens, ``[B, T, C]``, of y ``[B, S, c]``, all tokens of its channels; differentiable."""
    trip = _Trip(False, layout, num_channels)
    arrived: Tensor = _Wait.apply(_Start.apply(y, None, trip), trip, y.shape[0])
    return arrived
