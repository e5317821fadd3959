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
