"""Tokens of a block of chunks as batches of matrices, for the engines of decays and of the delta rule.

Shapes: a block has n chunks of c tokens. Every tensor of it is ``[n, B, H, c, D]``, chunks first, as states between chunks are
``[num_slots, B, H, K, V]``: a chunk of a batch row and head is one matrix, and a run of chunks a view. H_k is the number of heads
of q and k, of which H is a multiple.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.ops.tiling import ChunkBlock


def flat(x: Tensor) -> Tensor:
    """``[n, B, H, a, b]`` as a batch of matrices ``[n·B·H, a, b]``."""
    return x.reshape(-1, *x.shape[-2:])


def batched_product(first: Tensor, second: Tensor) -> Tensor:
    """Matrix products of ``[n, B, H, a, b]`` and ``[n, B, H, b, c]``."""
    return torch.bmm(flat(first), flat(second)).view(*first.shape[:-1], second.shape[-1])


Factor = Tensor | float | None
"""What tokens are multiplied by: ``[n, B or 1, H, c, D or 1]``, or a number; None is 1."""


def times(x: Tensor, factor: Factor) -> Tensor:
    """``x · factor``."""
    return x if factor is None else x * factor


def with_scale(factor: Tensor | None, scale: float) -> Factor:
    """``factor · scale``."""
    return factor * scale if factor is not None else scale if scale != 1.0 else None


def scaled(x: Tensor, factor: Factor, num_heads: int) -> Tensor:
    """``x [n, B, H_k, c, D] · factor`` with heads repeated to H, contiguous: a matrix product would copy a view each time.

    It may be x itself.
    """
    n, batch, num_key_heads, c, size = x.shape
    if factor is None and num_key_heads == num_heads:
        return x.contiguous()
    out = x.new_empty(n, batch, num_heads, c, size)
    source, target = x, out
    if num_key_heads != num_heads:
        target = out.view(n, batch, num_key_heads, num_heads // num_key_heads, c, size)
        source = x.unsqueeze(3).expand_as(target)
        if isinstance(factor, Tensor):
            factor = factor.unflatten(2, (num_key_heads, -1))
    if factor is None:
        target.copy_(source)
    else:
        torch.mul(source, factor, out=target)
    return out


def put_scaled(target: Tensor, block: ChunkBlock, values: Tensor, factor: Factor = None, add: bool = False) -> None:
    """Write or add ``values [n, B, H, c, D] · factor`` to the block's tokens of ``target [B, T, H_k, D]``, shared heads summed."""
    num_key_heads = target.shape[2]
    if num_key_heads != values.shape[2]:
        values, factor = times(values, factor).unflatten(2, (num_key_heads, -1)).sum(3), None
    if block.tokens is not None:
        values = times(values, factor)
        block.put(target, values + block.take(target) if add else values)
        return
    place = block.take(target)
    if factor is None:
        place.add_(values) if add else place.copy_(values)
    elif not add:
        torch.mul(values, factor, out=place)
    elif isinstance(factor, Tensor):
        place.addcmul_(values, factor)
    else:
        place.add_(values, alpha=factor)
