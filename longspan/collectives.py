"""Collectives of torch.distributed under one name for every torch release that longspan supports (2.11 and later)."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor


def all_gather_single(out: Tensor, local: Tensor, group: dist.ProcessGroup | None, async_op: bool = False) -> Any:
    """Gather ``local [n, ...]`` of every rank into ``out [P · n, ...]``; both contiguous. Returns the work if `async_op`.

    torch 2.13 renamed all_gather_into_tensor.
    """
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return gather(out, local, group=group, async_op=async_op)


def reduce_scatter_single(out: Tensor, local: Tensor, group: dist.ProcessGroup | None, async_op: bool = False) -> Any:
    """Sum ``local [P · n, ...]`` over ranks and keep this rank's part in ``out [n, ...]``; both contiguous.

    Returns the work if `async_op`. torch 2.13 renamed reduce_scatter_tensor.
    """
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return scatter(out, local, group=group, async_op=async_op)
