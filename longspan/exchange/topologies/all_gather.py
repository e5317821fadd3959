"""LASP-2 (arXiv 2502.07563, Algorithms 2 and 4): one AllGather of (A, U), after which every rank folds its own prefix.

Backward is one AllGather of the gradients G, folded from the last segment on with the transitions that forward kept. With n
segments per rank, a rank sends

    forward    (P − 1) · n · (|U| + |A|) numbers in P − 1 messages
    backward   (P − 1) · n · |U|         numbers in P − 1 messages

whatever the sequence length, |A| = 0 where every rank knows the transitions. It folds up to n · P − 1 pairs.

A rank that needs nothing from others does not wait. Backward that is the last rank; forward it is the first, where every rank
knows the transitions, so that it has nothing to keep for backward.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longspan.comm.collectives import all_gather_single
from longspan.comm.numbering import Step, launch
from longspan.comm.traffic import note_collective, waiting
from longspan.exchange.segments import gathered_rows, reorder_rows
from longspan.exchange.topology import Arrived, Carrier, Handle, ReverseHandle, Topology
from longspan.exchange.wire import HEADER_BYTES, Wire, header_words, with_header
from longspan.layout import SequenceLayout, group_of
from longspan.plan import Cluster, DirectionCost, Problem
from longspan.state import Form, Pair, Transition, exclusive_scan, exclusive_scan_adjoint


def _gather(local: Tensor, layout: SequenceLayout, phase: str) -> tuple[Tensor, Any]:
    """Start gathering ``local [num_segments, numbers]`` of every rank; returns the buffer and the work."""
    others = layout.num_ranks - 1
    note_collective("all_gather", phase, others * local.nbytes, others)
    numbers = local.shape[1] + HEADER_BYTES // local.element_size()
    out = local.new_empty(layout.num_ranks * local.shape[0], numbers)

    def collective(group: dist.ProcessGroup, step: Step) -> Any:
        return all_gather_single(out, with_header(local, step.word), group, async_op=True)

    return out, launch(group_of(layout), local.device, "all_gather", phase, collective, lambda: header_words(out))


@dataclass
class _ForwardGather(Handle):
    gathered: Tensor
    work: Any
    pair: Pair
    layout: SequenceLayout
    wire: Wire = field(default_factory=Wire)

    def wait(self) -> Arrived:
        layout, transition, state = self.layout, self.pair.transition, self.pair.state
        own = layout.own_segments
        if transition.is_known and max(own) == 0:
            return Arrived(torch.zeros_like(state), (transition.parameter,))
        with waiting():
            self.work.wait()
        rows = reorder_rows(self.gathered, gathered_rows(layout), layout)
        shape = state.shape[1:]
        parameter = transition.parameter
        if not transition.is_known:
            parameter = self.wire.unpack_parameter(rows, shape, parameter.shape[1:], parameter.dtype)
        needed = max(own) + 1
        states = self.wire.unpack(rows[:needed], shape, state.dtype)
        prefix = exclusive_scan(Pair(transition.form(parameter[:needed]), states))
        return Arrived(reorder_rows(prefix, own, layout), (parameter,))


@dataclass
class _ReverseGather(ReverseHandle):
    gathered: Tensor
    work: Any
    transition: Transition
    layout: SequenceLayout
    grad_incoming: Tensor
    wire: Wire = field(default_factory=Wire)

    def wait(self) -> Tensor:
        layout, like = self.layout, self.grad_incoming
        own = layout.own_segments
        first = min(own)
        if first == len(layout.all_segments) - 1:
            return torch.zeros_like(like)
        with waiting():
            self.work.wait()
        rows = reorder_rows(self.gathered, gathered_rows(layout), layout)
        grads = self.wire.unpack(rows[first:], like.shape[1:], like.dtype)
        outgoing = exclusive_scan_adjoint(self.transition.form(self.transition.parameter[first:]), grads)
        return reorder_rows(outgoing, [index - first for index in own], layout)


@dataclass(frozen=True)
class AllGather(Topology, Carrier):
    """LASP-2's exchange: best for few ranks and small states. States are rounded or coded once."""

    name = "all_gather"

    def start(self, pair: Pair, layout: SequenceLayout) -> Handle:
        sent = None if pair.transition.is_known else pair.transition.parameter
        wire = self.wire("forward")
        gathered, work = _gather(wire.pack(pair.state, sent), layout, "forward")
        return _ForwardGather(gathered, work, pair, layout, wire)

    def start_reverse(
        self, kind: Form, context: tuple[Tensor, ...], grad_incoming: Tensor, layout: SequenceLayout
    ) -> ReverseHandle:
        wire = self.wire("backward")
        gathered, work = _gather(wire.pack(grad_incoming), layout, "backward")
        return _ReverseGather(gathered, work, kind(*context), layout, grad_incoming, wire)

    def direction_cost(self, problem: Problem, cluster: Cluster, backward: bool) -> DirectionCost:
        """LASP-2: one all-gather of n pairs per rank, then every rank folds the segments before its own.

        An all-gather passes blocks round a ring of the ranks: P − 1 steps, in each of which every rank sends n · (|U| + |A|) to
        the next, and one rank of each node out of its node. (n · |U| backward.) The last segment's owner folds n P − 1 pairs when
        it waits.

        seconds = (P − 1) · (latency + n · (|U| + |A|) / bandwidth) + (n P − 1) · fold(R)
        """
        steps = problem.num_ranks - 1
        block = problem.segments_per_rank * (problem.state if backward else problem.pair)
        folds = (problem.num_segments - 1) * cluster.fold(problem.fold_size(problem.num_rows), at_once=True)
        folds += cluster.coding(problem.coding_size(problem.num_rows, times=problem.num_segments), at_once=True)
        return DirectionCost(steps * cluster.gather_step(block) + folds, folds, steps * block, steps, steps)
