"""A scan by rows: an all-to-all that gives each member of a group some rows of every stretch, their scan, an all-to-all back.

A row is one batch row and head of a state, R = B · H of them; no row depends on another. So the members of a group may share the
rows out: each takes the pairs of *all* stretches for its rows, scans them, and returns what enters each stretch to its holder.
The first R mod M of M members take one row more; where there are fewer rows than members, some take none.

Shapes: M members, n stretches per member, R rows, r rows of this member, K key size, V value size. States are
``[n, 1, R, K, V]``, so that the transitions of `longspan.state` apply with the rows as heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch.distributed as dist
from torch import Tensor

from longspan.comm.all_to_all import start_all_to_all_within
from longspan.comm.background import Task
from longspan.comm.numbering import check_arrived, current_step
from longspan.exchange.segments import reorder_rows
from longspan.exchange.topology import Arrived, Handle, ReverseHandle
from longspan.exchange.wire import HEADER_BYTES, Wire, header_words, with_header, without_header
from longspan.layout import SequenceLayout, group_of
from longspan.state import Pair, Transition, exclusive_scan, exclusive_scan_adjoint


def as_rows(states: Tensor) -> Tensor:
    """``[n, B, H, K, V]`` as ``[n, 1, B · H, K, V]``."""
    return states.flatten(1, 2).unsqueeze(1)


def known_rows(parameter: Tensor, num_batch_rows: int) -> Tensor:
    """The parameter of transitions that every rank knows, ``[n]`` or ``[n, H]``, with the rows as heads: ``[n]`` or ``[n, R]``."""
    return parameter if parameter.dim() == 1 else parameter.repeat(1, num_batch_rows)


def pair_of_rows(pair: Pair) -> Pair:
    """A pair with states ``[n, B, H, K, V]`` as one with states ``[n, 1, B · H, K, V]``."""
    states, transition = as_rows(pair.state), pair.transition
    form = transition.form.repeated(pair.state.shape[1])
    if transition.is_known:
        return Pair(form(known_rows(transition.parameter, pair.state.shape[1])), states)
    return Pair(form(transition.parameter.reshape(transition.parameter_shape(states.shape))), states)


def _by_row(states: Tensor) -> Tensor:
    """``[n, 1, R, ...]`` as ``[R · n, ...]``, a row's stretches one after another."""
    return states.squeeze(1).transpose(0, 1).flatten(0, 1)


@dataclass(frozen=True)
class Shares:
    """Rows shared out over the members of a group, of which this rank is number `place`; a single member needs no group.

    counts: how many rows each member takes. own: which ones this rank takes.
    """

    group: dist.ProcessGroup | None
    num_members: int
    place: int
    num_rows: int

    @property
    def counts(self) -> list[int]:
        base, longer = divmod(self.num_rows, self.num_members)
        return [base + (member < longer) for member in range(self.num_members)]

    @property
    def own(self) -> slice:
        counts = self.counts
        start = sum(counts[: self.place])
        return slice(start, start + counts[self.place])

    def of_known(self, parameter: Tensor) -> Tensor:
        """This rank's rows of a parameter that all ranks know: ``[n]`` as it is, ``[n, R]`` as ``[n, r]``."""
        return parameter if parameter.dim() == 1 else parameter[:, self.own]


@dataclass(frozen=True)
class RowExchange:
    """The two all-to-alls of a scan by rows.

    order: for each of all M · n stretches in the order of the scan, its number in the members' stretches laid one after another.
    layout: of the ranks, for what is made once for it.
    wire: how states travel.
    """

    shares: Shares
    order: Sequence[int]
    layout: SequenceLayout
    wire: Wire

    def deal(self, states: Tensor) -> Tensor:
        """Give each member its rows of this rank's stretches, and take this rank's rows of all stretches.

        ``[n, 1, R, K, V]`` in, ``[M · n, 1, r, K, V]`` in the order of the scan out.
        """
        received = self._deal(self.wire.pack(_by_row(states)), states.shape[0])
        return self.wire.unpack(received, states.shape[3:], states.dtype).view(self._dealt_shape(states))

    def deal_pair(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """`deal` for states and their transitions; returns the states and the transitions' parameter."""
        states, transition, shape = pair.state, pair.transition, self._dealt_shape(pair.state)
        # A transition's numbers laid out by row, as a state's are.
        width = prod(transition.parameter_shape((1, 1, 1, *states.shape[3:])))
        numbers = _by_row(transition.parameter.reshape(*states.shape[:3], width))
        received = self._deal(self.wire.pack(_by_row(states), numbers), states.shape[0])
        parameter = self.wire.unpack_parameter(received, states.shape[3:], numbers.shape[1:], states.dtype)
        dealt = self.wire.unpack(received, states.shape[3:], states.dtype).reshape(shape)
        return dealt, parameter.view(transition.parameter_shape(shape))

    def _dealt_shape(self, states: Tensor) -> tuple[int, ...]:
        shares = self.shares
        return (shares.num_members * states.shape[0], 1, shares.counts[shares.place], *states.shape[3:])

    def _deal(self, packed: Tensor, num_stretches: int) -> Tensor:
        """``[R · n, numbers]`` in the order of rows to ``[M · n · r, numbers]`` in the order of the scan."""
        shares, counts = self.shares, self.shares.counts
        own, members = counts[shares.place], shares.num_members
        numbers = packed.shape[1]
        sent = packed.view(shares.num_rows, num_stretches * numbers)
        received = self._swap(sent, counts, [own] * members)
        by_member = received.unflatten(0, (members, own)).unflatten(2, (num_stretches, numbers)).transpose(1, 2)
        return reorder_rows(by_member.flatten(0, 1), self.order, self.layout).flatten(0, 1)

    def collect(self, states: Tensor) -> Tensor:
        """The way back: ``[M · n, 1, r, K, V]`` in the order of the scan to this rank's stretches ``[n, 1, R, K, V]``."""
        shares, (total, _, own, *state_shape) = self.shares, states.shape
        num_stretches = total // shares.num_members
        place = self.layout.cached(
            ("places", tuple(self.order)), lambda: sorted(range(total), key=self.order.__getitem__)
        )
        rows = self.wire.pack(states.flatten(0, 2))
        numbers = rows.shape[1]
        packed = rows.view(total, own, numbers)
        by_member = reorder_rows(packed, place, self.layout).view(shares.num_members, num_stretches, own, numbers)
        sent = by_member.transpose(1, 2).reshape(shares.num_members * own, num_stretches * numbers)
        received = self._swap(sent, [own] * shares.num_members, shares.counts)
        rows = received.unflatten(1, (num_stretches, numbers)).flatten(0, 1)
        collected = self.wire.unpack(rows, state_shape, states.dtype)
        return collected.unflatten(0, (shares.num_rows, num_stretches)).transpose(0, 1).unsqueeze(1).contiguous()

    def _swap(self, sent: Tensor, send_rows: list[int], receive_rows: list[int]) -> Tensor:
        """What arrives; waits for it, without counting that as the rank's waiting: it is done beside the main thread."""
        shares = self.shares
        if shares.num_members == 1 or shares.num_rows == 0:
            return sent
        step = current_step()
        sent = with_header(sent, step.word)
        flight = start_all_to_all_within(
            shares.group, shares.place, sent, send_rows, receive_rows, self.wire.phase, header_bytes=HEADER_BYTES
        )
        flight.work.wait()
        check_arrived(header_words(flight.received), group_of(self.layout), step)
        return without_header(flight.received)


def scan_by_rows(exchange: RowExchange, pair: Pair) -> tuple[Tensor, Transition]:
    """The exclusive scan of all members' stretches.

    Args:
        exchange: how the members exchange.
        pair: this rank's stretches, states ``[n, 1, R, K, V]``; where every rank knows the transitions, those of all M · n
            stretches in the order of the scan.

    Returns:
        The state that enters each of this rank's stretches ``[n, 1, R, K, V]``, and the transitions of all stretches for this
        rank's rows, which `scan_by_rows_adjoint` takes.
    """
    transition = pair.transition
    if transition.is_known:
        states = exchange.deal(pair.state)
        parameter = exchange.shares.of_known(transition.parameter)
    else:
        states, parameter = exchange.deal_pair(pair)
    own = transition.form.of_heads(exchange.shares.own)(parameter)
    return exchange.collect(exclusive_scan(Pair(own, states))), own


def scan_by_rows_adjoint(exchange: RowExchange, transition: Transition, grads: Tensor) -> Tensor:
    """λ of this rank's stretches ``[n, 1, R, K, V]``, given their G and the transitions of all stretches for this rank's rows."""
    return exchange.collect(exclusive_scan_adjoint(transition, exchange.deal(grads)))


@dataclass(frozen=True)
class PendingScan(Handle):
    """A forward exchange that runs beside the main thread."""

    task: Task[Arrived]

    def wait(self) -> Arrived:
        return self.task.wait()


@dataclass(frozen=True)
class PendingScanAdjoint(ReverseHandle):
    """A backward exchange that runs beside the main thread."""

    task: Task[Tensor]

    def wait(self) -> Tensor:
        return self.task.wait()


def shares_of(rows: int, members: int) -> set[int]:
    """How many of `rows` a member may own."""
    return {rows // members, -(-rows // members)}


def sent_by_rows(members: int, rows: int, own: int, stretches: int, there: int, back: int) -> int:
    """Bytes that a member with `own` of the rows sends: its stretches' rows to their owners, and its own rows of all others back.

    there, back: bytes of one row of one stretch.
    """
    return stretches * ((rows - own) * there + (members - 1) * own * back)


def messages_by_rows(members: int, rows: int, owns: bool) -> int:
    """Messages that a member sends there and back: to others that own rows, and then, if it owns any itself, to all others."""
    owners = min(rows, members)
    return (owners - 1) + (members - 1) if owns else owners
