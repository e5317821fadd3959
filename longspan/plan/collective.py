"""Cost of the topologies made of collectives: all_gather, all_to_all, two_level."""

from __future__ import annotations

from longspan.plan.cluster import Cluster
from longspan.plan.cost import DirectionCost
from longspan.plan.problem import Problem


def all_gather(problem: Problem, cluster: Cluster, backward: bool) -> DirectionCost:
    """LASP-2: one all-gather of n pairs a rank, then every rank folds the segments before its own.

    An all-gather passes blocks round a ring of the ranks: P − 1 steps, in each of which every rank sends n · (|U| + |A|) to the
    next, and one rank of each node out of its node. (n · |U| backward.) The last segment's owner folds n P − 1 pairs when it waits.

    seconds = (P − 1) · (latency + n · (|U| + |A|) / bandwidth) + (n P − 1) · fold(R)
    """
    steps = problem.num_ranks - 1
    block = problem.segments_per_rank * (problem.state if backward else problem.pair)
    folds = (problem.num_segments - 1) * cluster.fold(problem.fold_size(problem.num_rows), at_once=True)
    return DirectionCost(steps * cluster.gather_step(block) + folds, folds, steps * block, steps, steps)


def all_to_all(problem: Problem, cluster: Cluster, backward: bool) -> DirectionCost:
    """All-to-all by rows: every rank scans all segments for r = R / P rows, and sends back what enters each segment.

    Two all-to-alls, n · (|U| + |A|) · (P − 1) / P a rank there (n · |U| · (P − 1) / P backward) and n · |U| · (P − 1) / P back,
    and n P − 1 folds of r rows in between. In an all-to-all (P − m) / (P − 1) of the bytes leave the node.

    seconds = 2 · (latency + (P − 2) · gap) + bytes / bandwidth + (n P − 1) · fold(R / P)

    Where P does not divide R, ⌈R / P⌉ rows of the rank that takes most set the time, and bytes and messages are those of the
    rank that sends most.
    """
    ranks, rows, stretches = problem.num_ranks, problem.num_rows, problem.segments_per_rank
    there = problem.row_state + (0 if backward else problem.row_transition)
    shares = _shares(rows, ranks)
    largest = max(shares)
    # What the rank with most rows receives is what the all-to-all ends with; the same again in the other direction.
    seconds = cluster.all_to_all(stretches * (ranks - 1) * largest * there)
    seconds += cluster.all_to_all(stretches * (ranks - 1) * largest * problem.row_state)
    seconds += (problem.num_segments - 1) * cluster.fold(problem.fold_size(largest), at_once=True)
    sent = max(sent_by_rows(ranks, rows, own, stretches, there, problem.row_state) for own in shares)
    messages = max(messages_by_rows(ranks, rows, own > 0) for own in shares)
    return DirectionCost(seconds, 0.0, sent, messages, 2)


def two_level(problem: Problem, cluster: Cluster, backward: bool) -> DirectionCost:
    """All-to-all by rows inside each of N nodes of m ranks, and for the nodes' runs of segments along rails of N ranks.

    In its node a rank takes R / m rows of the node's n runs of m segments, composes each run to one pair in m − 1 steps, and folds
    the state that enters it through it in m − 1 steps more. The rail scans N · n pairs of R / P rows. Dense transitions are
    composed by products of matrices, forward alone. All ranks of a node use its links to the others at once.

    seconds = 2 · all-to-all inside + 2 · all-to-all along the rail
              + (m − 1) · (compose(n R / m) + fold(n R / m)) + (n N − 1) · fold(R / P)
    """
    nodes, members, stretches = cluster.num_nodes, cluster.ranks_per_node, problem.segments_per_rank
    there, back = problem.row_state + (0 if backward else problem.row_transition), problem.row_state
    in_node = -(-problem.num_rows // members)
    on_rail = -(-in_node // nodes)
    seconds = 0.0
    for row in (there, back):
        if members > 1:
            seconds += cluster.intra.seconds(stretches * (members - 1) * in_node * row, True, members - 1)
        if nodes > 1:
            seconds += cluster.inter.seconds(stretches * (nodes - 1) * on_rail * row, True, nodes - 1)
    step, rows = problem.fold_size, stretches * in_node
    composed = step(rows) if backward else problem.compose_size(rows)
    seconds += (members - 1) * (cluster.fold(composed, at_once=True) + cluster.fold(step(rows), at_once=True))
    seconds += (stretches * nodes - 1) * cluster.fold(step(on_rail), at_once=True)
    shares = [(own, part) for own in _shares(problem.num_rows, members) for part in _shares(own, nodes)]
    sent = [
        sent_by_rows(members, problem.num_rows, own, stretches, there, back)
        + sent_by_rows(nodes, own, part, stretches, there, back)
        for own, part in shares
    ]
    messages = [
        messages_by_rows(members, problem.num_rows, own > 0) + messages_by_rows(nodes, own, part > 0)
        for own, part in shares
    ]
    steps = 2 * (members > 1) + 2 * (nodes > 1)
    return DirectionCost(seconds, 0.0, max(sent), max(messages), steps)


def _shares(rows: int, members: int) -> set[int]:
    """How many of `rows` a member may own."""
    return {rows // members, -(-rows // members)}


def sent_by_rows(members: int, rows: int, own: int, stretches: int, there: int, back: int) -> int:
    """Bytes that a member with `own` of the rows sends: the others' rows of its stretches there, and its own of theirs back.

    there, back: bytes of one row of one stretch.
    """
    return stretches * ((rows - own) * there + (members - 1) * own * back)


def messages_by_rows(members: int, rows: int, owns: bool) -> int:
    """Messages of a member there and back: to the others that have rows, and to all others if it owns any itself."""
    owners = min(rows, members)
    return (owners - 1) + (members - 1) if owns else owners
