"""A model over ranks, from outside: the mesh, sequence parallelism, weights divided over ranks, the sum of gradients."""

from longspan.degrees import MeshDegrees
from longspan.parallel.adapters import Adapter, register_adapter
from longspan.parallel.apply import parallelize, sum_gradients, unparallelize
from longspan.parallel.compiled import compile_blocks
from longspan.parallel.materialise import materialise
from longspan.parallel.mesh import ParallelMesh
from longspan.parallel.precision import compute_in
from longspan.parallel.recompute import recompute_blocks
from longspan.parallel.sharded import gathered, shard_weights

__all__ = [
    "Adapter",
    "MeshDegrees",
    "ParallelMesh",
    "compile_blocks",
    "compute_in",
    "gathered",
    "materialise",
    "parallelize",
    "recompute_blocks",
    "register_adapter",
    "shard_weights",
    "sum_gradients",
    "unparallelize",
]
