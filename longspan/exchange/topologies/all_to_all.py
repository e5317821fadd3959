"""All-to-all by rows: each rank scans all P · n segments for its share of the rows, so that bytes and folds stop growing with P.

A row is one batch row and head, R = B · H of them, shared out as evenly as may be (`longspan.exchange.scan_by_rows`); where R <
P, some ranks take none. One all-to-all brings the pairs (A, U) of all segments to the owners of their rows, these scan them, and
a second one brings the state that enters each segment back to its holder. Backward is the same on (Aᵀ, G), with the transitions
that forward brought. With n segments per rank, and r rows on this rank, a rank sends

    forward    n · ((R − r) · (|U| + |A|) + (P − 1) · r · |U|) / R numbers,  (P − 1) · n · (2 |U| + |A|) / P where P divides R
    backward   n · ((R − r) · |U| + (P − 1) · r · |U|) / R numbers,          (P − 1) · n · 2 |U| / P         where P divides R

each way in at most 2 (P − 1) messages: one to every other rank that has rows, and one to every other rank if it has rows itself.
|A| = 0 where every rank knows the transitions. A rank folds P · n − 1 pairs of r rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from longspan.comm.background import run_beside
from longspan.exchange.scan_by_rows import (
    PendingScan,
    PendingScanAdjoint,
    RowExchange,
    Shares,
    as_rows,
    known_rows,
    messages_by_rows,
    pair_of_rows,
    scan_by_rows,
    scan_by_rows_adjoint,
    sent_by_rows,
    shares_of,
)
from longspan.exchange.segments import gathered_rows
from longspan.exchange.topology import Arrived, Carrier, Handle, ReverseHandle, Topology
from longspan.layout import SequenceLayout, group_of
from longspan.plan import Cluster, DirectionCost, Problem
from longspan.state import Form, Pair


@dataclass(frozen=True)
class AllToAll(Topology, Carrier):
    """Best for many ranks: what a rank sends does not grow with their number. States are rounded or coded each way."""

    name = "all_to_all"

    def start(self, pair: Pair, layout: SequenceLayout) -> Handle:
        def work(group: dist.ProcessGroup) -> Arrived:
            return self._scan(pair, layout, group)

        return PendingScan(run_beside(group_of(layout), pair.state.device, work, name=self.name))

    def start_reverse(
        self, kind: Form, context: tuple[Tensor, ...], grad_incoming: Tensor, layout: SequenceLayout
    ) -> ReverseHandle:
        def work(group: dist.ProcessGroup) -> Tensor:
            return self._scan_adjoint(kind, context, grad_incoming, layout, group)

        return PendingScanAdjoint(
            run_beside(group_of(layout), grad_incoming.device, work, name=self.name, phase="backward")
        )

    def _scan(self, pair: Pair, layout: SequenceLayout, group: dist.ProcessGroup) -> Arrived:
        incoming, transition = scan_by_rows(self._rows(pair.state, layout, group, "forward"), pair_of_rows(pair))
        context = pair.transition if pair.transition.is_known else transition
        return Arrived(incoming.view(pair.state.shape), (context.parameter,))

    def _scan_adjoint(
        self,
        kind: Form,
        context: tuple[Tensor, ...],
        grad_incoming: Tensor,
        layout: SequenceLayout,
        group: dist.ProcessGroup,
    ) -> Tensor:
        rows = self._rows(grad_incoming, layout, group, "backward")
        (parameter,) = context
        if kind.is_known:
            parameter = rows.shares.of_known(known_rows(parameter, grad_incoming.shape[1]))
        own = kind.repeated(grad_incoming.shape[1]).of_heads(rows.shares.own)
        return scan_by_rows_adjoint(rows, own(parameter), as_rows(grad_incoming)).view(grad_incoming.shape)

    def _rows(self, states: Tensor, layout: SequenceLayout, group: dist.ProcessGroup, phase: str) -> RowExchange:
        shares = Shares(group, layout.num_ranks, layout.rank, states.shape[1] * states.shape[2])
        return RowExchange(shares, gathered_rows(layout), layout, self.wire(phase))

    def direction_cost(self, problem: Problem, cluster: Cluster, backward: bool) -> DirectionCost:
        """All-to-all by rows: every rank scans all segments for r = R / P rows, and sends back what enters each segment.

        Two all-to-alls, n · (|U| + |A|) · (P − 1) / P a rank there (n · |U| · (P − 1) / P backward) and n · |U| · (P − 1) / P back,
        and n P − 1 folds of r rows in between. In an all-to-all (P − m) / (P − 1) of the bytes leave the node.

        seconds = 2 · (latency + (P − 2) · gap) + bytes / bandwidth + (n P − 1) · fold(R / P)

        Where P does not divide R, ⌈R / P⌉ rows of the rank that takes most set the time, and bytes and messages are those of the
        rank that sends most.
        """
        ranks, rows, stretches = problem.num_ranks, problem.num_rows, problem.segments_per_rank
        there = problem.row_state + (0 if backward else problem.row_transition)
        shares = shares_of(rows, ranks)
        largest = max(shares)
        # What the rank with most rows receives is what the all-to-all ends with; the same again in the other direction.
        seconds = cluster.all_to_all(stretches * (ranks - 1) * largest * there)
        seconds += cluster.all_to_all(stretches * (ranks - 1) * largest * problem.row_state)
        seconds += (problem.num_segments - 1) * cluster.fold(problem.fold_size(largest), at_once=True)
        seconds += cluster.coding(problem.coding_size(rows, times=2 * stretches, messages=2), at_once=True)
        sent = max(sent_by_rows(ranks, rows, own, stretches, there, problem.row_state) for own in shares)
        messages = max(messages_by_rows(ranks, rows, own > 0) for own in shares)
        return DirectionCost(seconds, 0.0, sent, messages, 2)
