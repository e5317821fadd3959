"""States of one row, one key or one value column, fewer rows than ranks or nodes: every topology and order is the scan."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longspan.exchange import TOPOLOGIES, Pipelined
from longspan.layout import SequenceLayout
from longspan.state import ChannelDecay, Dense, HeadDecay, Identity, ScalarDecay, Transition
from tests.compare import worst
from tests.exchange.scan import errors_of_scan
from tests.ranks import run_on_ranks

KINDS: list[type[Transition]] = [Identity, HeadDecay, ScalarDecay, ChannelDecay, Dense]
SHAPES = [(1, 1, 1, 1), (1, 1, 1, 5), (1, 1, 3, 1), (2, 1, 1, 1), (1, 3, 1, 2)]
NAMES = [name for name in TOPOLOGIES if name != "neighbour"]


def errors_of_small(name: str, order: Any, ranks_per_node: int, state_dtype: torch.dtype | None) -> list[float]:
    topology = Pipelined(state_dtype, 3) if name == "pipelined" else TOPOLOGIES[name](state_dtype)
    dtype = torch.float64 if state_dtype is None else torch.float32
    return [
        error
        # No document starts with a segment: what enters one that needs nothing is left open.
        for documents in (None, [0, 1, 8, 23, 41])
        for kind in KINDS
        for shape in SHAPES
        for error in errors_of_scan(
            topology, kind, shape, SequenceLayout(41, None, order, documents, ranks_per_node=ranks_per_node), dtype
        )
    ]


# Order, ranks, and ranks of a node, which one topology knows of. Quick are the first case of each, and the last of that with nodes.
SPLITS = [("contiguous", 3, 1), ("zigzag", 3, 1), ("contiguous", 4, 1), ("zigzag", 4, 1)]
WITH_NODES = [("contiguous", 4, 2), ("zigzag", 4, 2)]
QUICK = [SPLITS[0], WITH_NODES[1]]
CASES = [
    pytest.param(name, *split, marks=() if split in QUICK else pytest.mark.slow)
    for name in NAMES
    for split in [*SPLITS, *(WITH_NODES if name == "two_level" else [])]
]


@pytest.mark.slow_rows(r"^two_level-contiguous-3", r"^(two_level-zigzag-4-2|all_to_all|pipelined)")
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^all_gather-contiguous-3")
@pytest.mark.parametrize(("name", "order", "num_ranks", "ranks_per_node"), CASES)
def test_small_states_are_the_scan(name: str, order: str, num_ranks: int, ranks_per_node: int) -> None:
    for state_dtype, limit in ((None, 1e-12), (torch.bfloat16, 0.1)):
        for errors in run_on_ranks(num_ranks, errors_of_small, name, order, ranks_per_node, state_dtype):
            assert worst(errors) < limit
