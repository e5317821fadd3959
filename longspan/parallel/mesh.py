"""The mesh of a process group's ranks, and its sub-meshes by name; `longspan.degrees` says which rank stands where."""

from __future__ import annotations

from typing import TYPE_CHECKING

from longspan.comm.groups import group_of_ranks
from longspan.degrees import DimensionName, MeshDegrees
from longspan.errors import LayoutError

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh


class ParallelMesh:
    """A mesh of all ranks of the default process group, and its sub-meshes by name.

    Args:
        degrees: its sizes.
        device_type: ``"cuda"`` or ``"cpu"``: where tensors are that are exchanged. Give a rank its GPU first.

    Every rank makes it at once, and asks for the same sub-meshes in the same order: the first time that makes a process group, with
    the backend and the timeout of the default one.

    Raises:
        ConfigError: if the degrees do not make up the world; the message lists those that do.
        LayoutError: without a process group.
    """

    def __init__(self, degrees: MeshDegrees, device_type: str = "cpu") -> None:
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            raise LayoutError(
                "a mesh is of the ranks of a process group, and there is none. Call torch.distributed.init_process_group() "
                "first; MeshDegrees alone answers which rank sits where"
            )
        degrees.check_world(dist.get_world_size())
        self.degrees = degrees
        self.rank = dist.get_rank()
        self._device_type = device_type
        self._meshes: dict[str, DeviceMesh] = {}

    def __getitem__(self, name: DimensionName) -> DeviceMesh:
        """The one-dimensional sub-mesh of this rank's group along a dimension, see `MeshDegrees.dimensions`."""
        from torch.distributed.device_mesh import DeviceMesh

        if name not in self._meshes:
            self._meshes[name] = DeviceMesh.from_group(self.group(name), self._device_type, mesh_dim_names=(name,))
        return self._meshes[name]

    def group(self, name: DimensionName) -> dist.ProcessGroup:
        """The process group of this rank along a dimension; that of the same ranks is one in all meshes and under all names."""
        # torch's own meshes make groups with torch's default timeout, whatever the user has set.
        (ranks,) = (ranks for ranks in self.degrees.groups(name) if self.rank in ranks)
        return group_of_ranks(ranks)

    def size(self, name: DimensionName) -> int:
        """Number of ranks along a dimension."""
        return self.degrees.size(name)

    def coordinate(self, name: DimensionName) -> int:
        """Where this rank stands along a dimension, from 0."""
        return self.degrees.coordinate(self.rank, name)

    @property
    def weights(self) -> DeviceMesh:
        """What FSDP2's `fully_shard` is given: ``("replicate", "shard")``, or ``("shard",)`` where no two ranks hold the same."""
        if self.size("replicate") == 1:
            return self["shard"]
        from torch.distributed.device_mesh import DeviceMesh

        if "weights" not in self._meshes:
            self._meshes["weights"] = DeviceMesh.from_group(
                [self.group("replicate"), self.group("shard")],
                self._device_type,
                mesh=[list(ranks) for ranks in self.degrees.groups("shard")],
                mesh_dim_names=("replicate", "shard"),
            )
        return self._meshes["weights"]

    def describe(self) -> str:
        """Which rank sits where, in a few lines for a person."""
        return self.degrees.describe()
