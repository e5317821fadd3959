"""Which tensors of a checkpoint a rank writes, and copies of them to write from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from longspan.parallel.sharded import is_divided, on_this_rank


def own_share(tensors: Mapping[str, Tensor], rank: int, world_size: int) -> dict[str, Tensor]:
    """The tensors of which this rank writes what it has: of ranks that have the same, one does, and all write about as much.

    Every rank finds it without asking: it follows from the names and the whole shapes, which are the same on all of them.
    """
    written: dict[int, list[int]] = {}
    share = {}
    for name, tensor in sorted(tensors.items(), key=lambda entry: entry[0]):
        copies, copy = _copies(tensor, rank, world_size)
        loads = written.setdefault(copies, [0] * copies)
        writer = loads.index(min(loads))
        loads[writer] += tensor.numel() * tensor.element_size() + 1
        if writer == copy and on_this_rank(tensor).numel() > 0:
            share[name] = tensor
    return share


def _copies(tensor: Any, rank: int, world_size: int) -> tuple[int, int]:
    """How many ranks have the same part of a tensor, and which of them this one is."""
    if not is_divided(tensor):
        return world_size, rank
    copies, copy = 1, 0
    for size, place, placement in zip(
        tensor.device_mesh.shape, tensor.device_mesh.get_coordinate(), tensor.placements, strict=True
    ):
        if placement.is_replicate():
            copies, copy = copies * size, copy * size + place
    return copies, copy


@torch.no_grad()
def staged(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, which an optimizer step does not change."""
    copies = {}
    for name, tensor in tensors.items():
        local = on_this_rank(tensor)
        copy = torch.empty_like(local, device="cpu").copy_(local, non_blocking=True)
        copies[name] = _divided_as(tensor, copy) if is_divided(tensor) else copy
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return copies


def _divided_as(tensor: Any, local: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )
