"""An exchange at hand as the cost model sees it: its problem, and the machines that are assumed where nobody measured."""

from __future__ import annotations

import torch

from longspan.layout import SequenceLayout
from longspan.plan import Cluster, Problem, stated_cluster
from longspan.state import Pair


def problem_of(pair: Pair, layout: SequenceLayout, state_dtype: torch.dtype | None) -> Problem:
    """The sizes of an exchange; see `Carrier.start` for the pair. state_dtype: of states on the wire; None is their own."""
    dtype = pair.state.dtype
    return Problem.of_states(
        type(pair.transition), pair.state.shape, layout, dtype.itemsize, (state_dtype or dtype).itemsize
    )


def stated_cluster_of(layout: SequenceLayout, device_type: str) -> Cluster:
    """`stated_cluster` for the layout's ranks: on the nodes that the layout was told of, or else on one node."""
    return stated_cluster(device_type, layout.num_ranks, layout.ranks_per_node or layout.num_ranks)
