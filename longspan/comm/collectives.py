"""Collectives under one name for every torch release that longspan supports (2.11 and later), and a numbered all-reduce."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longspan.comm.numbering import launch
from longspan.comm.traffic import note_collective, waiting


def all_gather_single(out: Tensor, local: Tensor, group: dist.ProcessGroup | None, async_op: bool = False) -> Any:
    """Gather ``local [n, ...]`` of every rank into ``out [P · n, ...]``; both contiguous. Returns the work if `async_op`.

    torch 2.13 renamed all_gather_into_tensor.
    """
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return gather(out, local, group=group, async_op=async_op)


def all_reduce(
    x: Tensor, group: dist.ProcessGroup, phase: str, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
) -> Tensor:
    """The sum of x over the ranks, or another `operation`, on every rank, contiguous: an exchange that is waited for at once."""
    total = x.clone(memory_format=torch.contiguous_format)
    num_ranks = group.size()
    note_collective("all_reduce", phase, 2 * (num_ranks - 1) * total.numel() * total.element_size() // num_ranks)
    with waiting():
        launch(
            group,
            x.device,
            "all_reduce",
            phase,
            lambda channel, _: dist.all_reduce(total, operation, group=channel, async_op=True),
        ).wait()
    return total
