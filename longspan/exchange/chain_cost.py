"""What a chain of messages costs by the model: `ring`, `pipelined` and `neighbour` are one chain, with one block or several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from longspan.plan import Cluster, DirectionCost, Problem, WireFormat

Wires = Sequence[WireFormat | None]
"""How states travel from each rank to the next, in the order in which ranks hold the sequence; None is as they are."""


def chain_cost(
    problem: Problem,
    cluster: Cluster,
    num_blocks: int,
    wire_inside: WireFormat | None = None,
    wires: Wires | None = None,
) -> DirectionCost:
    """The cost of one direction of a chain in M blocks of value columns; both directions cost the same.

    Each segment's owner sends n or fewer states and no transition. A chain of h messages crosses every boundary between segments
    of different ranks: h = P − 1 contiguous, 2P − 2 zigzag, which turns at the last rank; h is shorter where documents cut it. The
    first block takes h hops of |U| / M, and folds at each segment that it passes: f = h + n − 2 of them (n P − 2 for one document),
    as the first segment has nothing to fold and the last one nothing to send. The other M − 1 blocks follow. Each comes later
    than the one before it by the time that the busiest rank takes for a block, while all ranks are at work.

        seconds = Σ_hops (latency + |U| / M bandwidth) + f · fold(R / M) + (M − 1) · n · (gap + |U| / M bandwidth + fold(R / M))

    steps = h − 1 + M. Blocks are as large as the largest: ⌈V / M⌉ of V columns. A codec's time comes on top of each fold's: for the
    first block that of a rank by itself, for those that follow that of all ranks at once.

    problem: with states as they travel between nodes. wire_inside: how they travel inside a node. wires: of each hop, in place of
    both.
    """
    num_blocks = min(num_blocks, problem.value_size)
    columns = -(-problem.value_size // num_blocks)
    share = columns / problem.value_size
    size = problem.fold_size(problem.num_rows * share)
    folds = max(0, problem.chain + problem.segments_per_rank - 2)
    if wires is not None:
        blocks = [_message(replace(problem, wire=wire), columns, cluster) for wire in wires]
        hops = [cluster.hop_seconds(place, block.num_bytes) + block.coding for place, block in enumerate(blocks)]
        seconds = cluster.along(hops, problem.chain) + folds * cluster.fold(size, at_once=False)
        # The slowest hop sets the pace of all blocks behind the first.
        pace = max(
            cluster.pace(place, block.num_bytes, size) + block.coding_at_once for place, block in enumerate(blocks)
        )
        seconds += (num_blocks - 1) * problem.segments_per_rank * pace
        sent = bytes_by_hop(problem, num_blocks, wires)
        messages = messages_of_chain(problem)
        return DirectionCost(seconds, 0.0, sent, messages * num_blocks, problem.chain - 1 + num_blocks)
    between, inside = (_message(each, columns, cluster) for each in (problem, replace(problem, wire=wire_inside)))
    leaving = _between_nodes(problem, cluster)
    seconds = cluster.hops(problem.chain, leaving, between.num_bytes, folds, size, inside.num_bytes)
    seconds += leaving * between.coding + (problem.chain - leaving) * inside.coding
    following = cluster.follow(between.num_bytes, size, inside.num_bytes)
    following += max(between.coding_at_once, inside.coding_at_once)
    seconds += (num_blocks - 1) * problem.segments_per_rank * following
    messages = messages_of_chain(problem)
    # Of the rank that sends most, between nodes if there are several.
    outermost = problem if cluster.num_nodes > 1 else replace(problem, wire=wire_inside)
    sent = messages * problem.num_rows * _bytes_of_blocks(outermost, num_blocks)
    return DirectionCost(seconds, 0.0, sent, messages * num_blocks, problem.chain - 1 + num_blocks)


@dataclass(frozen=True)
class _Message:
    """One block of a state on the wire: its bytes, and seconds to encode and decode it, by one rank alone and by all at once."""

    num_bytes: int
    coding: float
    coding_at_once: float


def _message(problem: Problem, columns: int, cluster: Cluster) -> _Message:
    share = columns / problem.value_size
    size = problem.coding_size(problem.num_rows * share)
    num_bytes = problem.num_rows * problem.row_bytes(columns)
    return _Message(num_bytes, cluster.coding(size, at_once=False), cluster.coding(size, at_once=True))


def _bytes_of_blocks(problem: Problem, num_blocks: int) -> int:
    """Of one row of a state in blocks of value columns as even as may be."""
    size = problem.value_size
    edges = [size * block // num_blocks for block in range(num_blocks + 1)]
    return sum(problem.row_bytes(stop - start) for start, stop in pairwise(edges))


def bytes_by_hop(problem: Problem, num_blocks: int, wires: Wires) -> int:
    """What the rank sends that sends most: a state over one hop, or in zigzag order one over each of the two beside it."""
    hops = [problem.num_rows * _bytes_of_blocks(replace(problem, wire=wire), num_blocks) for wire in wires]
    if messages_of_chain(problem) == 1:
        return max(hops)
    return max(before + behind for before, behind in pairwise(hops))


def messages_of_chain(problem: Problem) -> int:
    """Messages of the rank that sends most: one per segment. Of two ranks in zigzag order, each has one segment that sends none."""
    return problem.segments_per_rank if problem.num_ranks > 2 else 1


def _between_nodes(problem: Problem, cluster: Cluster) -> int:
    """How many messages of the longest chain leave their node."""
    whole = problem.segments_per_rank * (cluster.num_nodes - 1)
    return min(whole, -(-problem.chain // cluster.ranks_per_node))
