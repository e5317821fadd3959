"""Two levels: a scan by rows inside each node; between nodes one pair for each run of segments, along rails.

Inside its node a rank takes its share of the rows (batch rows × heads) of the node's segments, by an all-to-all. It composes each
run of consecutive segments that the node holds (one, or two with zigzag) into one pair. Which state enters the runs it finds
together with the ranks of the same place in the other nodes, its *rail*, by a scan by rows of all nodes' runs
(`longspan.exchange.scan_by_rows`). Then it folds its runs from that state, and returns what enters each segment by an all-to-all
inside the node. Backward is the same on (Aᵀ, G), with the transitions that forward brought.

P = N · L ranks in N nodes of L, n segments per rank, R = B · H rows. Where L divides R and N divides R / L, a rank sends

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
from longspan.errors import LayoutError
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
from longspan.exchange.segments import reorder_rows
from longspan.exchange.topology import Arrived, Carrier, Handle, ReverseHandle, Topology
from longspan.layout import SequenceLayout, group_of
from longspan.plan import Cluster, DirectionCost, Problem
from longspan.state import Form, Pair, Transition


@dataclass(frozen=True)
class TwoLevel(Topology, Carrier):
    """Best for many nodes: each rank sends one share of one rank's states between them.

    The nodes are those of a layout's two-dimensional mesh or of its `ranks_per_node`; else hosts, told apart by their names.

    States are rounded or coded at both levels, each way: inside nodes by `codec_inside`, between them by `codec`.
    """

    name = "two_level"
    tells_links_apart = True

    def serves(self, pair: Pair, layout: SequenceLayout, cluster: Cluster) -> bool:
        """Whether there are several nodes of several ranks, and the layout's nodes are the cluster's."""
        if cluster.num_nodes == 1 or cluster.ranks_per_node == 1:
            return False
        try:
            nodes = _nodes(layout)
            return nodes.ranks_per_node == cluster.ranks_per_node and _nodes_stay_together(layout, nodes)
        except LayoutError:
            return False

    def start(self, pair: Pair, layout: SequenceLayout) -> Handle:
        two = self._levels(pair.state, layout, "forward")
        return PendingScan(
            run_beside(group_of(layout), pair.state.device, lambda _: _scan_two_levels(pair, two), name=self.name)
        )

    def start_reverse(
        self, kind: Form, context: tuple[Tensor, ...], grad_incoming: Tensor, layout: SequenceLayout
    ) -> ReverseHandle:
        two = self._levels(grad_incoming, layout, "backward")

        def work(_: dist.ProcessGroup) -> Tensor:
            return _scan_two_levels_adjoint(kind, context, grad_incoming, two)

        return PendingScanAdjoint(
            run_beside(group_of(layout), grad_incoming.device, work, name=self.name, phase="backward")
        )

    def carrier(self, pair: Pair, layout: SequenceLayout) -> Carrier:
        nodes = _nodes(layout)
        if not _nodes_stay_together(layout, nodes):
            raise LayoutError(
                "the topology 'two_level' needs the ranks of a node to hold parts of the sequence that follow one another; got "
                f"nodes of {nodes.ranks_per_node} ranks and rank_order {list(layout.rank_order)}. Order whole nodes, as "
                f"longspan.plan.chain_order(links, num_bytes, ranks_per_node={nodes.ranks_per_node}) does, or take 'all_to_all'"
            )
        return self

    def _levels(self, states: Tensor, layout: SequenceLayout, phase: str) -> _Levels:
        nodes = _nodes(layout)
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
            RowExchange(in_node, runs.node_order, layout, self.wire(phase, inside=True)),
            RowExchange(on_rail, runs.rail_order, layout, self.wire(phase)),
        )

    def direction_cost(self, problem: Problem, cluster: Cluster, backward: bool) -> DirectionCost:
        """All-to-all by rows inside each of N nodes of m ranks, and for the nodes' runs of segments along rails of N ranks.

        In its node a rank takes R / m rows of the node's n runs of m segments, composes each run to one pair in m − 1 steps, and
        folds the state that enters it through it in m − 1 steps more. The rail scans N · n pairs of R / P rows. Dense transitions
        are composed by products of matrices, forward alone. All ranks of a node use its links to the others at once.

        seconds = 2 · all-to-all inside + 2 · all-to-all along the rail
                  + (m − 1) · (compose(n R / m) + fold(n R / m)) + (n N − 1) · fold(R / P)
        """
        nodes, members, stretches = cluster.num_nodes, cluster.ranks_per_node, problem.segments_per_rank
        inside = self.on_wire(problem, inside=True)
        transition = 0 if backward else problem.row_transition
        outer, inner = ((each.row_state + transition, each.row_state) for each in (problem, inside))
        in_node = -(-problem.num_rows // members)
        on_rail = -(-in_node // nodes)
        seconds = 0.0
        for row, row_inside in zip(outer, inner, strict=True):
            if members > 1:
                seconds += cluster.all_to_all_inside(stretches * (members - 1) * in_node * row_inside)
            if nodes > 1:
                seconds += cluster.all_to_all_of_rails(stretches * (nodes - 1) * on_rail * row)
        for coded, coded_rows in ((inside, problem.num_rows), (problem, in_node)):
            seconds += cluster.coding(coded.coding_size(coded_rows, times=2 * stretches, messages=2), at_once=True)
        step, rows = problem.fold_size, stretches * in_node
        composed = step(rows) if backward else problem.compose_size(rows)
        seconds += (members - 1) * (cluster.fold(composed, at_once=True) + cluster.fold(step(rows), at_once=True))
        seconds += (stretches * nodes - 1) * cluster.fold(step(on_rail), at_once=True)
        shares = [(own, part) for own in shares_of(problem.num_rows, members) for part in shares_of(own, nodes)]
        sent = [
            sent_by_rows(members, problem.num_rows, own, stretches, *inner)
            + sent_by_rows(nodes, own, part, stretches, *outer)
            for own, part in shares
        ]
        messages = [
            messages_by_rows(members, problem.num_rows, own > 0) + messages_by_rows(nodes, own, part > 0)
            for own, part in shares
        ]
        steps = 2 * (members > 1) + 2 * (nodes > 1)
        return DirectionCost(seconds, 0.0, max(sent), max(messages), steps)


def _nodes_stay_together(layout: SequenceLayout, nodes: Nodes) -> bool:
    """Whether the ranks of each node hold parts of the sequence that follow one another."""
    order, size = layout.rank_order, nodes.ranks_per_node
    return all(len({rank // size for rank in order[first : first + size]}) == 1 for first in range(0, len(order), size))


def _nodes(layout: SequenceLayout) -> Nodes:
    try:
        return nodes_of(group_of(layout), layout.ranks_per_node)
    except LayoutError as error:
        raise LayoutError(
            f"the topology 'two_level' needs nodes: {error}. SequenceLayout takes ranks_per_node, or a DeviceMesh of nodes x "
            "ranks; the topology 'all_to_all' knows no nodes"
        ) from error


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
    # Ranks of a node follow each other, and so do their segments of a slot: runs come in global order.
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

    def known(self, form: Form, parameter: Tensor) -> tuple[list[Transition], Transition]:
        """Transitions that every rank knows, given those of all segments with the rows as heads, ``[S]`` or ``[S, R]``.

        For this rank's rows in its node: of this node's runs by step, and of every whole run. form: of all rows.
        """
        own = self.node.shares.of_known(parameter)
        layout, kind = self.node.layout, form.of_heads(self.node.shares.own)
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


def _scan_two_levels(pair: Pair, levels: _Levels) -> Arrived:
    kind, rows = pair.transition.form, pair_of_rows(pair)
    transitions: list[Transition]
    if kind.is_known:
        states = levels.node.deal(rows.state)
        transitions, whole = levels.known(rows.transition.form, rows.transition.parameter)
    else:
        states, parameter = levels.node.deal_pair(rows)
        own = rows.transition.form.of_heads(levels.node.shares.own)
        transitions = [own(step) for step in levels.steps(parameter)]
        whole = _composed(transitions)
    steps = [Pair(transition, state) for transition, state in zip(transitions, levels.steps(states), strict=True)]
    into_runs, rail_transition = scan_by_rows(levels.rail, Pair(whole, _folded(steps)))
    arrived = levels.node.collect(torch.cat(_before_each(steps, into_runs))).view(pair.state.shape)
    if kind.is_known:
        return Arrived(arrived, (pair.transition.parameter,))
    return Arrived(arrived, (parameter, rail_transition.parameter))


def _scan_two_levels_adjoint(kind: Form, context: tuple[Tensor, ...], grad_incoming: Tensor, levels: _Levels) -> Tensor:
    grads = levels.node.deal(as_rows(grad_incoming))
    transitions: list[Transition]
    if kind.is_known:
        rows = grad_incoming.shape[1]
        transitions, whole = levels.known(kind.repeated(rows), known_rows(context[0], rows))
        rail = levels.rail.shares
        rail_transition = whole.form.of_heads(rail.own)(rail.of_known(whole.parameter))
    else:
        parameter, rail_parameter = context
        own = kind.repeated(grad_incoming.shape[1]).of_heads(levels.node.shares.own)
        transitions = [own(step) for step in levels.steps(parameter)]
        rail_transition = own.of_heads(levels.rail.shares.own)(rail_parameter)
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
