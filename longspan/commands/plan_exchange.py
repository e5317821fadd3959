"""``longspan plan exchange``: the exchange of a layer on a cluster that is not here."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from longspan.commands.options import parse_options, refuse
from longspan.commands.table import cost_table
from longspan.commands.units import bytes_per_second, seconds
from longspan.errors import ConfigError, LongspanError
from longspan.exchange import TOPOLOGIES, by_cost
from longspan.launch import EXIT_DONE
from longspan.ops.variants import VARIANTS
from longspan.plan.cluster import Cluster, Link
from longspan.plan.problem import Problem
from longspan.plan.stated import gpu_cluster
from longspan.state import Transition

_DESCRIPTION = """What each topology's exchange of states would cost on a cluster given by numbers: nothing is measured.

Rates have units, 400gbit or 45GB a second, and so have times: 15us, 0.2ms.
"""


def run(arguments: Sequence[str]) -> int:
    """Print the table that the arguments ask for, and return the exit code."""
    options = parse_options(PlanExchange, "plan exchange", _DESCRIPTION, arguments)
    try:
        if options.operator not in VARIANTS:
            raise ConfigError(f"operator must be one of {', '.join(VARIANTS)}; got {options.operator!r}")
        sys.stdout.write(options.report(VARIANTS[options.operator].transition))
    except LongspanError as error:
        return refuse(error)
    return EXIT_DONE


@dataclass(frozen=True)
class LayerOptions:
    """The layer whose states are exchanged."""

    operator: str = "gla"
    """Linear attention whose transitions are sent along."""
    batch_size: int = 1
    heads: int = 16
    """Heads of the layer that are on a rank."""
    key_size: int = 128
    value_size: int = 128
    order: Literal["contiguous", "zigzag"] = "contiguous"
    """Who holds which segment."""
    bfloat16: bool = False
    """Round states to bfloat16 for the wire."""

    def describe(self) -> str:
        """The layer in a line."""
        shape = f"B{self.batch_size} H{self.heads} K{self.key_size} V{self.value_size}"
        return f"{self.operator}, {shape}, {self.order}"


@dataclass(frozen=True)
class PlanExchange(LayerOptions):
    """The exchange of one layer on a cluster given by numbers. The defaults are round numbers for GPUs, not measurements."""

    ranks: int = 64
    """Ranks that share a sequence."""
    ranks_per_node: int = 8
    intra_latency: str = "5us"
    """Of a message between two ranks of a node."""
    intra_bandwidth: str = "300GB"
    """Of one rank to others of its node, per second; in bytes (300GB) or bits (100gbit)."""
    inter_latency: str = "15us"
    """Of a message between two nodes."""
    inter_bandwidth: str = "400gbit"
    """Of one network card, per second."""
    links_per_node: int | None = None
    """Network cards per node; without a number, one for each rank."""
    fold_latency: str = "10us"
    """Of adding a segment's pair to a state, however small."""
    fold_bandwidth: str = "500GB"
    """Of states that a rank folds, per second."""
    matmul_tflops: float = 20.0
    """Of a rank's float32 products of K×K and K×V matrices, for the delta rules."""
    compute: str = "0ms"
    """Computation beside the exchange, each way, for the column of what stays exposed."""

    def cluster(self) -> Cluster:
        """Raises LongspanError for values that make none."""
        ranks_per_node = min(self.ranks_per_node, self.ranks)
        links = min(self.links_per_node or ranks_per_node, ranks_per_node)
        return replace(
            gpu_cluster(self.ranks, ranks_per_node),
            intra=Link(seconds(self.intra_latency), bytes_per_second(self.intra_bandwidth), gap=2e-6),
            inter=Link(
                seconds(self.inter_latency),
                bytes_per_second(self.inter_bandwidth),
                gap=2e-6,
                sharing=ranks_per_node / links,
            ),
            rings=links,
            fold_latency=seconds(self.fold_latency),
            fold_bandwidth=bytes_per_second(self.fold_bandwidth),
            matmul_rate=self.matmul_tflops * 1e12,
        )

    def problem(self, transition: type[Transition]) -> Problem:
        """`transition` is that of the operator."""
        return Problem(
            num_ranks=self.ranks,
            num_rows=self.batch_size * self.heads,
            key_size=self.key_size,
            value_size=self.value_size,
            transition=transition,
            segments_per_rank=2 if self.order == "zigzag" and self.ranks > 1 else 1,
            state_bytes=2 if self.bfloat16 else 4,
        )

    def report(self, transition: type[Transition]) -> str:
        """What the command prints."""
        cluster, problem = self.cluster(), self.problem(transition)
        priced = by_cost([kind() for name, kind in TOPOLOGIES.items() if name != "neighbour"], problem, cluster)
        what = f"{self.describe()}, modelled; a state has {problem.state:,} bytes, a pair {problem.pair:,}"
        return f"{what}\n{cluster}\n\n{cost_table([each.cost for each in priced], seconds(self.compute))}"
