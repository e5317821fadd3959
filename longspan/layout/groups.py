"""The process group of a layout: what a user gives for one, and how its ranks stand on nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from longspan.errors import LayoutError
from longspan.layout.documents import shortened

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def resolve_group(group: Any) -> tuple[dist.ProcessGroup | None, int, int, int | None]:
    """(process group, its size, this rank in it, ranks per node where a mesh says so).

    One rank where nothing is initialised and no group is given.
    """
    ranks_per_node = None
    if group is None:
        if not (dist.is_available() and dist.is_initialized()):
            return None, 1, 0, None
        group = dist.group.WORLD
    elif hasattr(group, "get_group") and hasattr(group, "ndim"):
        if group.ndim == 2:
            ranks_per_node = group.size(1)
        group = _group_of_mesh(group)
    if not isinstance(group, dist.ProcessGroup):
        if group == dist.GroupMember.NON_GROUP_MEMBER:
            raise LayoutError("this rank is not in the given group: give each rank the group that it belongs to")
        raise LayoutError(f"group must be a ProcessGroup or a one-dimensional DeviceMesh; got {type(group).__name__}")
    rank = dist.get_rank(group)
    if rank < 0:
        raise LayoutError("this rank is not in the given group: give each rank the group that it belongs to")
    return group, dist.get_world_size(group), rank, ranks_per_node


def _group_of_mesh(mesh: DeviceMesh) -> Any:
    """The process group of all ranks of a mesh of one dimension, or of nodes × ranks, node by node."""
    if mesh.ndim == 1:
        return mesh.get_group()
    names = mesh.mesh_dim_names or ()
    # The name is asked for because a mesh of data × sequence parallelism, given whole by mistake, looks the same.
    if mesh.ndim != 2 or not names or names[0] != "node":
        raise LayoutError(
            "group must be a one-dimensional DeviceMesh, or one of nodes x ranks of a node whose first dimension is named "
            f'"node"; got one with dimensions {names or mesh.ndim}. Take its sequence-parallel part, as in mesh["sp"] or '
            'mesh["node", "sp"]'
        )
    ranks = mesh.mesh.flatten().tolist()
    if ranks != sorted(ranks):
        raise LayoutError(f"a mesh of nodes x ranks must hold its ranks in rising order; got {shortened(ranks)}")
    return dist.group.WORLD if len(ranks) == dist.get_world_size() else mesh._flatten().get_group()


def check_ranks_per_node(ranks_per_node: Any, num_ranks: int) -> int | None:
    """`ranks_per_node`; raises LayoutError unless it is None or divides the ranks."""
    if ranks_per_node is None:
        return None
    if isinstance(ranks_per_node, bool) or not isinstance(ranks_per_node, int) or ranks_per_node < 1:
        raise LayoutError(f"ranks_per_node must be None or an int of at least 1; got {ranks_per_node!r}")
    if num_ranks % ranks_per_node:
        raise LayoutError(
            f"ranks_per_node {ranks_per_node} does not divide the {num_ranks} ranks of the group: nodes must have equally many "
            "ranks. Use a divisor, or leave it out where no exchange needs it"
        )
    return ranks_per_node
