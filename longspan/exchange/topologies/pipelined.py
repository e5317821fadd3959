"""ZeCO's All-Scan (arXiv 2507.01004, Algorithm 2): the ring in blocks of value columns, which follow each other through the ranks.

A rank folds and sends block b while block b + 1 arrives, so that all ranks work at once: P − 2 + M steps of a block, for M blocks,
in place of P − 1 hops of a whole state (zigzag: 2P − 3 + M in place of 2P − 2). Every block takes the ring's way: bytes are the
ring's, and messages M times as many. A state has at most V blocks. Blocks of key rows would be wrong for matrix transitions,
which mix the rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from longspan.errors import InputError
from longspan.exchange.chain_cost import Wires, chain_cost
from longspan.exchange.chained import chain_for
from longspan.exchange.problem import problem_of, stated_cluster_of
from longspan.exchange.topology import Carrier, Topology
from longspan.layout import SequenceLayout
from longspan.plan import Cluster, Cost, DirectionCost, Problem
from longspan.state import Pair


@dataclass(frozen=True)
class Pipelined(Topology):
    """ZeCO's exchange: for large states on few ranks. States are rounded or coded at each hop.

    Args:
        num_blocks: into how many blocks a state is cut, at most V; None takes what the cost model says.

    Raises:
        InputError: for a value out of range.
    """

    name = "pipelined"
    tells_links_apart = True
    is_chain = True
    num_blocks: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        blocks: object = self.num_blocks
        if blocks is not None and (isinstance(blocks, bool) or not isinstance(blocks, int) or blocks < 1):
            raise InputError(f"num_blocks must be None or an int of at least 1; got {blocks!r}")

    def settled(self, problem: Problem, cluster: Cluster) -> Pipelined:
        if self.num_blocks:
            return self
        return replace(self, num_blocks=best_num_blocks(self.on_wire(problem), cluster, self.wires_of_hops))

    def carrier(self, pair: Pair, layout: SequenceLayout) -> Carrier:
        num_blocks = self.num_blocks
        if num_blocks is None:
            problem = self.on_wire(problem_of(pair, layout, self.state_dtype))
            cluster = stated_cluster_of(layout, pair.state.device.type)
            key = ("num_blocks", problem, cluster, self.wires_of_hops)
            num_blocks = layout.cached(key, lambda: best_num_blocks(problem, cluster, self.wires_of_hops))
        return chain_for(self, layout, num_blocks)

    def cost(self, problem: Problem, cluster: Cluster) -> Cost:
        return replace(super().cost(problem, cluster), num_blocks=self.settled(problem, cluster).num_blocks)

    def direction_cost(self, problem: Problem, cluster: Cluster, backward: bool) -> DirectionCost:
        """The ring in M blocks, which follow each other."""
        wires = self.wires_of_hops
        num_blocks = self.num_blocks or best_num_blocks(problem, cluster, wires)
        return chain_cost(problem, cluster, num_blocks, self.on_wire(problem, inside=True).wire, wires)


def best_num_blocks(problem: Problem, cluster: Cluster, wires: Wires | None = None) -> int:
    """How many blocks make `Pipelined` fastest: more blocks start the next rank sooner, and cost a gap each.

    wires: as `chain_cost` takes them.
    """
    return min(
        range(1, problem.value_size + 1),
        key=lambda blocks: (chain_cost(problem, cluster, blocks, wires=wires).seconds, blocks),
    )
