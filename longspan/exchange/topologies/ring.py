"""LASP (arXiv 2404.02882, Algorithms 2 and 3): the running state goes from rank to rank, each adding what its segment wrote.

A rank receives S_in and sends ``A · S_in + U``; backward it receives λ and sends ``Aᵀ · λ + G`` (`longspan.exchange.chain`).
Transitions never travel. For one document a rank sends

    contiguous    |U| numbers in 1 message; none on the last rank (backward: on the first)
    zigzag        2 · |U| numbers in 2 messages; half of it on the first rank, and on the last, where the chain turns

forward, and as much backward: the least of all topologies. The messages follow one another, P − 1 of them (zigzag: 2P − 2). Where a
document starts inside a segment a chain begins anew, at once; where one starts at its first token there is no message.
"""

from __future__ import annotations

from dataclasses import dataclass

from longspan.exchange.chain_cost import chain_cost
from longspan.exchange.chained import chain_for
from longspan.exchange.topology import Carrier, Topology
from longspan.layout import SequenceLayout
from longspan.plan import Cluster, DirectionCost, Problem
from longspan.state import Pair


@dataclass(frozen=True)
class Ring(Topology):
    """LASP's exchange: least bytes, one rank after another; the baseline. States are rounded or coded at each hop."""

    name = "ring"
    tells_links_apart = True
    is_chain = True

    def carrier(self, pair: Pair, layout: SequenceLayout) -> Carrier:
        return chain_for(self, layout)

    def direction_cost(self, problem: Problem, cluster: Cluster, backward: bool) -> DirectionCost:
        """h hops, each a whole state, and a fold at each segment that the state passes; one rank works at a time."""
        return chain_cost(problem, cluster, 1, self.on_wire(problem, inside=True).wire, self.wires_of_hops)
