"""Two levels: a scan by rows inside each node; between nodes one pair for each run of segments, along rails.

Inside its node a rank takes its share of the rows (batch rows × heads) of the node's segments, by an all-to-all. It composes each
run of consecutive segments that the node holds (one, or two with zigzag) into one pair. Which state enters the runs it finds
together with the ranks of the same place in the other nodes, its *rail*, by a scan by rows of all nodes' runs
(`longspan.exchange.scan_by_rows`). Then it folds its runs from that state, and returns what enters each segment by an all-to-all
inside the node. Backward is the same on (Aᵀ, G), with the transitions that forward brought.

P = N · L ranks in N nodes of L, n segments a rank, R = B · H rows. Where L divides R and N divides R / L, a rank sends

                inside the node                    between nodes
    forward     (L − 1) · n · (2 |U| + |A|) / L    (N − 1) · n · (2 |U| + |A|) / P   numbers
    backward    (L − 1) · n · 2 |U| / L            (N − 1) · n · 2 |U| / P           numbers

each way in 2 (L − 1) messages inside the node and 2 (N − 1) between nodes. Otherwise it sends what a rank of `all_to_all` does:
for R rows in a group of L, and for its own share of them in a group of N. |A| = 0 where every rank knows the transitions. All ranks
of a node together send at most n · (2 |U| + |A|) between nodes, whatever N and L. A rank folds each of n · L pairs of R / L rows
twice, and N · n pairs of R / P rows; of Dense transitions it forms n · (L − 1) products for R / L rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from longspan.comm.background import run_beside
from longspan.comm.hosts import Nodes, node_group, nodes_of, rail_group
from longspan.exchange.scan_by_rows import (
    PendingScan,
    PendingScanAdjoint,
    RowExchange,
    Shares,
    as_rows,
    known_rows,
    pair_of_rows,
    scan_by_rows,
    scan_by_rows_adjoint,
)
from longspan.exchange.segments import reorder_rows
from longspan.exchange.topology import Arrived, Handle, ReverseHandle, Topology
from longspan.layout import SequenceLayout, group_of
from longspan.state import Pair, Transition


@dataclass(frozen=True)
class TwoLevel(Topology):
    """Best for many nodes: what travels between them is one share of one rank's states a rank.

    The nodes are those of a layout's two-dimensional mesh or of its `ranks_per_node`; else hosts, told apart by their names.

    state_dtype: states and their gradients are rounded to it for the wire, at both levels, each way; None sends them as they are.
    """

    name = "two_level"
    state_dtype: torch.dtype | None = None

    def start(self, pair: Pair, layout: SequenceLayout) -> Handle:
        two = self._levels(pair.state, layout, "forward")
        return PendingScan(run_beside(group_of(layout), pair.state.device, lambda _: _scan(pair, two), name=self.name))

    def start_reverse(
        self, kind: type[Transition], context: Tensor, grad_incoming: Tensor, layout: SequenceLayout
    ) -> ReverseHandle:
        two = self._levels(grad_incoming, layout, "backward")

        def work(_: dist.ProcessGroup) -> Tensor:
            return _scan_adjoint(kind, context, grad_incoming, two)

        return PendingScanAdjoint(
            run_beside(group_of(layout), grad_incoming.device, work, name=self.name, phase="backward")
        )

    def _levels(self, states: Tensor, layout: SequenceLayout, phase: str) -> _Levels:
        nodes = nodes_of(group_of(layout), layout.ranks_per_node)
        runs = _runs_of(layout, nodes)
        in_node = Shares(
            node_group(group_of(layout), nodes, phase),
            nodes.ranks_per_node,
            nodes.place,
            states.shape[1] * states.shape[2],
        )
        on_rail = Shares(
            rail_group(group_of(layout), nodes, phase), nodes.num_nodes, nodes.node, in_node.counts[nodes.place]
        )
        return _Levels(
            runs,
            RowExchange(in_node, runs.node_order, layout, self.state_dtype, phase),
            RowExchange(on_rail, runs.rail_order, layout, self.state_dtype, phase),
        )


@dataclass(frozen=True)
class _Runs:
    """The runs of consecutive segments that nodes hold, one for each slot of their ranks.

    A step of a run is one of its L segments; step i of several runs is done at once.

    all_steps: by step, the segment's global number of every run, runs in global order.
    own_steps: by step, the segment's global number of this node's runs, by slot.
    node_order: the same segments, one step after another, in the node's segments laid rank by rank.
    rail_order: every run, in global order, in the runs laid node by node.
    """

    all_steps: tuple[tuple[int, ...], ...]
    own_steps: tuple[tuple[int, ...], ...]
    node_order: tuple[int, ...]
    rail_order: tuple[int, ...]


def _runs_of(layout: SequenceLayout, nodes: Nodes) -> _Runs:
    return layout.cached(("runs of segments", nodes), lambda: _find_runs(layout, nodes))


def _find_runs(layout: SequenceLayout, nodes: Nodes) -> _Runs:
    segments, size = layout.all_segments, nodes.ranks_per_node
    # Ranks of a node are consecutive, and so are their segments of a slot: runs come in global order.
    runs: dict[tuple[int, int], list[int]] = {}
    for index, segment in enumerate(segments):
        runs.setdefault((segment.rank // size, segment.slot), []).append(index)
    slots = range(layout.num_segments)
    own_steps = tuple(tuple(runs[nodes.node, slot][step] for slot in slots) for step in range(size))
    return _Runs(
        all_steps=tuple(tuple(run[step] for run in runs.values()) for step in range(size)),
        own_steps=own_steps,
        node_order=tuple(
            segments[index].rank % size * layout.num_segments + segments[index].slot
            for step in own_steps
            for index in step
        ),
        rail_order=tuple(node * layout.num_segments + slot for node, slot in runs),
    )


@dataclass(frozen=True)
class _Levels:
    """The runs, and the exchanges inside the node and along the rail."""

    runs: _Runs
    node: RowExchange
    rail: RowExchange

    def known(self, kind: type[Transition], parameter: Tensor) -> tuple[list[Transition], Transition]:
        """Transitions that every rank knows, given those of all segments with the rows as heads, ``[S]`` or ``[S, R]``.

        For this rank's rows in its node: of this node's runs by step, and of every whole run.
        """
        own = self.node.shares.of_known(parameter)
        layout = self.node.layout
        steps = [kind(reorder_rows(own, step, layout)) for step in self.runs.own_steps]
        return steps, _composed([kind(reorder_rows(own, step, layout)) for step in self.runs.all_steps])

    def steps(self, stretches: Tensor) -> tuple[Tensor, ...]:
        """``[L · n, ...]`` in the node's order by step, ``[n, ...]`` each."""
        size = self.node.shares.num_members
        return stretches.unflatten(0, (size, stretches.shape[0] // size)).unbind(0)


def _composed(steps: list[Transition]) -> Transition:
    whole = steps[0]
    for step in steps[1:]:
        whole = step.after(whole)
    return whole


def _folded(steps: list[Pair]) -> Tensor:
    """What all steps together write."""
    state = steps[0].state
    for step in steps[1:]:
        state = step.apply(state)
    return state


def _before_each(steps: list[Pair], state: Tensor) -> list[Tensor]:
    """The state that enters each step, given the one that enters the first."""
    entering = [state]
    for step in steps[:-1]:
        state = step.apply(state)
        entering.append(state)
    return entering


def _scan(pair: Pair, levels: _Levels) -> Arrived:
    kind, rows = type(pair.transition), pair_of_rows(pair)
    if kind.is_known:
        states = levels.node.deal(rows.state)
        transitions, whole = levels.known(kind, rows.transition.parameter)
    else:
        states, parameter = levels.node.deal_pair(rows)
        transitions = [kind(step) for step in levels.steps(parameter)]
        whole = _composed(transitions)
    steps = [Pair(transition, state) for transition, state in zip(transitions, levels.steps(states), strict=True)]
    into_runs, rail_transition = scan_by_rows(levels.rail, Pair(whole, _folded(steps)))
    arrived = levels.node.collect(torch.cat(_before_each(steps, into_runs))).view(pair.state.shape)
    if kind.is_known:
        return Arrived(arrived, pair.transition.parameter)
    return Arrived(arrived, torch.cat([parameter.flatten(), rail_transition.parameter.flatten()]))


def _scan_adjoint(kind: type[Transition], context: Tensor, grad_incoming: Tensor, levels: _Levels) -> Tensor:
    grads = levels.node.deal(as_rows(grad_incoming))
    if kind.is_known:
        transitions, whole = levels.known(kind, known_rows(context, grad_incoming.shape[1]))
        rail_transition = kind(levels.rail.shares.of_known(whole.parameter))
    else:
        shape = kind.parameter_shape(grads.shape)
        parameter, rail_parameter = context.split(
            [torch.Size(shape).numel(), context.numel() - torch.Size(shape).numel()]
        )
        transitions = [kind(step) for step in levels.steps(parameter.view(shape))]
        shares = levels.rail.shares
        num_runs = shares.num_members * (grads.shape[0] // levels.node.shares.num_members)
        rail_shape = (num_runs, 1, shares.counts[shares.place], *grads.shape[3:])
        rail_transition = kind(rail_parameter.view(kind.parameter_shape(rail_shape)))
    # What a state's gradient becomes on its way from behind a segment to before it: Aᵀ λ + G.
    steps = [
        Pair(transition.adjoint(), grad) for transition, grad in zip(transitions, levels.steps(grads), strict=True)
    ]
    entering = torch.zeros_like(steps[0].state)
    for step in reversed(steps):
        entering = step.apply(entering)
    grad = scan_by_rows_adjoint(levels.rail, rail_transition, entering)
    outgoing = []
    for step in reversed(steps):
        outgoing.append(grad)
        grad = step.apply(grad)
    outgoing.reverse()
    return levels.node.collect(torch.cat(outgoing)).view(grad_incoming.shape)
