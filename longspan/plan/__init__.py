"""The cost model: machines, the sizes of an exchange, and what it costs.

Plain arithmetic on the host: nothing here measures or sends anything. Each topology has its formula in its own file
(`longspan.exchange.Topology.cost`), written with the quantities of this package; ``longspan plan exchange`` prints them for a
cluster given by numbers. The formulas, and what they leave out, stand in docs/exchange.md.
"""

from longspan.plan.cluster import Cluster, Link
from longspan.plan.cost import Cost, DirectionCost
from longspan.plan.links import LinkMatrix, chain_order
from longspan.plan.problem import Problem, longest_chain
from longspan.plan.schedule import Reading, overlap_pays
from longspan.plan.stated import gpu_cluster, stated_cluster
from longspan.plan.wire import WireFormat

__all__ = [
    "Cluster",
    "Cost",
    "DirectionCost",
    "Link",
    "LinkMatrix",
    "Problem",
    "Reading",
    "WireFormat",
    "chain_order",
    "gpu_cluster",
    "longest_chain",
    "overlap_pays",
    "stated_cluster",
]
