"""Clusters of round numbers: for planning, and to choose by where nobody measured."""

from __future__ import annotations

from longspan.plan.cluster import Cluster, Link


def gpu_cluster(num_ranks: int, ranks_per_node: int = 8) -> Cluster:
    """A cluster of round numbers for planning: nodes with a fast switch inside and one 400 Gbit/s card per rank between them.

    They are assumptions, not measurements; replace what is known better.
    """
    return Cluster(
        num_ranks,
        min(ranks_per_node, num_ranks),
        intra=Link(latency=5e-6, bandwidth=300e9, gap=2e-6),
        inter=Link(latency=15e-6, bandwidth=45e9, gap=2e-6),
        fold_latency=10e-6,
        fold_bandwidth=500e9,
        matmul_rate=20e12,
        attention_rate=400e12,
        rings=min(ranks_per_node, num_ranks),
    )


def stated_cluster(device_type: str, num_ranks: int, ranks_per_node: int) -> Cluster:
    """The figures that decide where nobody measured: the same for the same numbers of ranks, whatever the machine does.

    On CPUs the links are gloo's: inside a node as measured on loopback with two cores, between nodes an Ethernet of 1 Gbit/s. On
    GPUs they are those of `gpu_cluster`. A choice among topologies takes them; measure (``Auto(measure=True)``) where they are far
    from the machines at hand.
    """
    if device_type != "cpu":
        return gpu_cluster(num_ranks, ranks_per_node)
    return Cluster(
        num_ranks,
        ranks_per_node,
        intra=Link(latency=200e-6, bandwidth=1.5e9, gap=50e-6),
        inter=Link(latency=200e-6, bandwidth=120e6, gap=50e-6, sharing=float(ranks_per_node)),
        fold_latency=20e-6,
        fold_bandwidth=2.5e9,
        matmul_rate=40e9,
    )
