"""The cost of exchanging states over ranks: formulas, for choosing a topology and for clusters that are not here.

Plain arithmetic on the host: nothing here measures or sends anything. `longspan.exchange` measures the `Cluster` of a process
group and picks by these formulas (``exchange="auto"``); ``longspan plan exchange`` prints them for a cluster given by numbers.
The formulas, and what they leave out, stand in docs/exchange.md.
"""

from __future__ import annotations

from collections.abc import Iterable

from longspan.errors import InputError
from longspan.plan.cluster import Cluster, Link, gpu_cluster
from longspan.plan.collective import all_gather, all_to_all, two_level
from longspan.plan.cost import Cost, DirectionCost
from longspan.plan.problem import Problem, longest_chain
from longspan.plan.serial import neighbour, pipelined, ring

PLANNED = ("all_gather", "ring", "pipelined", "all_to_all", "two_level", "neighbour")
"""The topologies that have a formula."""

_SERIAL = {"ring": ring, "neighbour": neighbour}
_COLLECTIVE = {"all_gather": all_gather, "all_to_all": all_to_all, "two_level": two_level}


def time_of(topology: str, problem: Problem, cluster: Cluster, num_blocks: int | None = None) -> Cost:
    """What one exchange costs with a topology.

    Args:
        topology: a name in `PLANNED`.
        problem: sizes. Its ranks are the cluster's.
        cluster: machines.
        num_blocks: of ``"pipelined"``; None is `best_num_blocks`.

    Raises:
        InputError: for a topology without a formula, and where problem and cluster have different numbers of ranks.
    """
    if problem.num_ranks != cluster.num_ranks:
        raise InputError(
            f"the problem has {problem.num_ranks} ranks and the cluster {cluster.num_ranks}: take "
            "cluster.with_ranks(problem.num_ranks), or measure the group in question"
        )
    if topology == "pipelined":
        num_blocks = num_blocks or best_num_blocks(problem, cluster)
        phase = pipelined(problem, cluster, num_blocks)
        return Cost(topology, phase, phase, num_blocks)
    if topology in _SERIAL:
        phase = _SERIAL[topology](problem, cluster)
        return Cost(topology, phase, phase)
    if topology in _COLLECTIVE:
        formula = _COLLECTIVE[topology]
        return Cost(topology, formula(problem, cluster, False), formula(problem, cluster, True))
    raise InputError(f"there is no cost formula for {topology!r}; there are for {', '.join(map(repr, PLANNED))}")


def best_num_blocks(problem: Problem, cluster: Cluster) -> int:
    """How many blocks make ``"pipelined"`` fastest: more blocks start the next rank sooner, and cost a gap each."""
    return min(
        range(1, problem.value_size + 1), key=lambda blocks: (pipelined(problem, cluster, blocks).seconds, blocks)
    )


def by_cost(problem: Problem, cluster: Cluster, topologies: Iterable[str] = PLANNED) -> list[Cost]:
    """The costs of `topologies`, cheapest first; of two equal ones, the one named first."""
    return sorted((time_of(name, problem, cluster) for name in topologies), key=lambda cost: cost.seconds)


__all__ = [
    "PLANNED",
    "Cluster",
    "Cost",
    "DirectionCost",
    "Link",
    "Problem",
    "best_num_blocks",
    "by_cost",
    "gpu_cluster",
    "longest_chain",
    "time_of",
]
