"""ZeCO's All-Scan (arXiv 2507.01004, Algorithm 2): the ring in blocks of value columns, which follow each other through the ranks.

A rank folds and sends block b while block b + 1 arrives, so that all ranks work at once: P − 2 + M steps of a block, for M blocks,
in place of P − 1 hops of a whole state (zigzag: 2P − 3 + M in place of 2P − 2). Every block takes the ring's way: bytes are the
ring's, and messages M times as many. A state has at most V blocks. Blocks of key rows would be wrong for matrix transitions,
which mix the rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from longspan.comm.groups import kept
from longspan.exchange.auto.calibration import measured_cluster
from longspan.exchange.chain import Chain
from longspan.exchange.topology import Topology, Unresolved
from longspan.layout import SequenceLayout, group_of
from longspan.plan import Problem, best_num_blocks
from longspan.state import Pair


@dataclass(frozen=True)
class Pipelined(Unresolved):
    """ZeCO's exchange: for large states on few ranks.

    state_dtype: states and their gradients are rounded to it for the wire, at each hop; None sends them as they are.
    num_blocks: into how many blocks a state is cut, at most V; None takes what the cost model
        says for this process group, measured at its first exchange.
    """

    name = "pipelined"
    state_dtype: torch.dtype | None = None
    num_blocks: int | None = None

    def resolve(self, pair: Pair, layout: SequenceLayout) -> Topology:
        num_blocks = self.num_blocks or _best_num_blocks(pair, layout, self.state_dtype)
        return Chain(self.name, self.state_dtype, num_blocks)


def _best_num_blocks(pair: Pair, layout: SequenceLayout, state_dtype: torch.dtype | None) -> int:
    dtype, device = pair.state.dtype, pair.state.device
    problem = Problem.of_states(
        type(pair.transition), pair.state.shape, layout, dtype.itemsize, (state_dtype or dtype).itemsize
    )
    key = ("num_blocks", device.type, layout.ranks_per_node, problem)
    return kept(group_of(layout), key, lambda: best_num_blocks(problem, measured_cluster(layout, device)))
