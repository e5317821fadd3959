"""Which ranks share a node: what the caller says, or the names of the hosts, asked once per process group."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch.distributed as dist

from longspan.comm.groups import kept, new_group_beside
from longspan.comm.numbering import own_groups
from longspan.errors import LayoutError


@dataclass(frozen=True)
class Nodes:
    """P ranks as nodes of equally many consecutive ranks, seen from one rank.

    node: number of this rank's node. place: its number among the node's ranks.
    """

    num_nodes: int
    ranks_per_node: int
    node: int
    place: int


def nodes_of(group: dist.ProcessGroup, ranks_per_node: int | None = None) -> Nodes:
    """The nodes of a group's ranks.

    Of `ranks_per_node` consecutive ranks each. None takes the hosts' names, by one collective at the first call for the group, in
    which all ranks take part.

    Raises:
        LayoutError: on every rank, where a host's ranks are not consecutive, or hosts differ in their number of ranks.
    """
    if ranks_per_node is None:
        ranks_per_node = ranks_per_host(kept(group, "host names", lambda: _host_names(group)))
    node, place = divmod(group.rank(), ranks_per_node)
    return Nodes(group.size() // ranks_per_node, ranks_per_node, node, place)


def ranks_per_host(hosts: Sequence[str]) -> int:
    """How many ranks each host has, given the name of each rank's host.

    Raises:
        LayoutError: where a host's ranks are not consecutive, or hosts differ in their number of ranks.
    """
    runs = [(host, len(list(ranks))) for host, ranks in groupby(hosts)]
    counts = {count for _, count in runs}
    names = [host for host, _ in runs]
    if len(set(names)) == len(names) and len(counts) == 1:
        return counts.pop()
    raise LayoutError(
        "hosts are nodes only where each has equally many ranks, numbered host by host; the hosts of the ranks are, in their "
        f"order, {_listed(runs)}. Start the ranks so, or pass ranks_per_node"
    )


def _listed(runs: Sequence[tuple[str, int]]) -> str:
    listed = ", ".join(f"{host} ({count})" for host, count in runs[:8])
    return listed if len(runs) <= 8 else f"{listed}, and {len(runs) - 8} more"


def _host_names(group: dist.ProcessGroup) -> list[str]:
    names: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(names, socket.gethostname(), group=group)
    return names


def node_group(group: dist.ProcessGroup, nodes: Nodes, phase: str) -> dist.ProcessGroup | None:
    """A process group of this rank's node for one phase, made at the first call; None for a node of one rank."""
    if nodes.ranks_per_node == 1:
        return None
    first = nodes.node * nodes.ranks_per_node
    return _kept_group(group, ("node", nodes), phase, range(first, first + nodes.ranks_per_node))


def rail_group(group: dist.ProcessGroup, nodes: Nodes, phase: str) -> dist.ProcessGroup | None:
    """A process group of one phase of this rank's rail, the ranks of the same place in every node; None for a single node."""
    if nodes.num_nodes == 1:
        return None
    return _kept_group(group, ("rail", nodes), phase, range(nodes.place, group.size(), nodes.ranks_per_node))


def _kept_group(group: dist.ProcessGroup, key: tuple[str, Nodes], phase: str, members: range) -> dist.ProcessGroup:
    sides = own_groups(group, key, lambda side: new_group_beside(group, members, f"longspan {key[0]} {side}"))
    return sides[phase == "backward"]
