"""Cost of the topologies that hand a state from segment to segment: ring, pipelined, neighbour.

Each segment's owner sends n or fewer states and no transition. A chain of h messages crosses every boundary between segments of
different ranks: h = P − 1 contiguous, 2P − 2 zigzag, which turns at the last rank; h is shorter where documents cut it. Backward
the gradients of states go the same way in the other direction, with the same sizes, so that both directions cost the same.
"""

from __future__ import annotations

from longspan.plan.cluster import Cluster
from longspan.plan.cost import DirectionCost
from longspan.plan.problem import Problem


def ring(problem: Problem, cluster: Cluster) -> DirectionCost:
    """LASP's ring: h hops, each a whole state, and a fold at each segment that the state passes.

    seconds = Σ_hops (latency + |U| / bandwidth) + folds · fold(R), with folds = h + n − 2 (n P − 2 for one document): the first
    segment has nothing to fold, the last one nothing to send. One rank works at a time.
    """
    size = problem.fold_size(problem.num_rows)
    seconds = cluster.hops(problem.chain, _between_nodes(problem, cluster), problem.state, _folds(problem), size)
    messages = _messages(problem)
    return DirectionCost(seconds, 0.0, messages * problem.state, messages, problem.chain)


def pipelined(problem: Problem, cluster: Cluster, num_blocks: int) -> DirectionCost:
    """ZeCO's All-Scan: the ring in M blocks of the state, cut along V.

    The first block takes the ring's way, h hops of |U| / M and as many folds of a block. The M − 1 others follow it, each behind
    the one before it by what the busiest rank needs for a block: n times gap + |U| / (M · bandwidth) + a fold of R / M rows, with
    all ranks at once. steps = h − 1 + M. Blocks are as large as the largest: ⌈V / M⌉ of V columns.
    """
    num_blocks = min(num_blocks, problem.value_size)
    share = -(-problem.value_size // num_blocks) / problem.value_size
    block = problem.state * share
    size = problem.fold_size(problem.num_rows * share)
    first = cluster.hops(problem.chain, _between_nodes(problem, cluster), block, _folds(problem), size)
    seconds = first + (num_blocks - 1) * problem.segments_per_rank * cluster.follow(block, size)
    messages = _messages(problem)
    return DirectionCost(seconds, 0.0, messages * problem.state, messages * num_blocks, problem.chain - 1 + num_blocks)


def neighbour(problem: Problem, cluster: Cluster) -> DirectionCost:
    """One message a segment to the owner of the next, all at once, and no fold: for states that reach no further.

    seconds = latency + (n − 1) · gap + n · |U| / bandwidth, on the slower of the links inside and between nodes. For two
    segments it is the ring.
    """
    if problem.num_segments == 2:
        return ring(problem, cluster)
    messages = _messages(problem)
    seconds = cluster.to_next(messages * problem.state, messages)
    return DirectionCost(seconds, 0.0, messages * problem.state, messages, 1)


def _messages(problem: Problem) -> int:
    """Of the rank that sends most: its n segments, without zigzag's turn and end, which are all that two ranks have."""
    return problem.segments_per_rank if problem.num_ranks > 2 else 1


def _folds(problem: Problem) -> int:
    return max(0, problem.chain + problem.segments_per_rank - 2)


def _between_nodes(problem: Problem, cluster: Cluster) -> int:
    """How many messages of the longest chain leave their node."""
    whole = problem.segments_per_rank * (cluster.num_nodes - 1)
    return min(whole, -(-problem.chain // cluster.ranks_per_node))
