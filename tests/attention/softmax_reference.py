"""Dense softmax attention: the definition that the blockwise forms are compared with."""

from __future__ import annotations

import torch
from torch import Tensor


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, documents: tuple[int, ...], scale: float
) -> Tensor:
    """q [B, T, H, D]; k, v [B, T, H_kv, D]; documents are cu_seqlens. Any float dtype, masks and scores whole."""
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    positions = torch.arange(q.shape[1])
    document = torch.bucketize(positions, torch.tensor(documents[1:]), right=True)
    visible = document[:, None] == document[None, :]
    if causal:
        visible &= positions[:, None] >= positions[None, :]
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(~visible, float("-inf")).softmax(-1), v)


def random_inputs(
    seed: int, batch: int, tokens: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """q, k, v and an upstream gradient."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [heads, kv_heads, kv_heads, heads]
    return [torch.randn(batch, tokens, h, dim, generator=generator, dtype=torch.float64).to(dtype) for h in sizes]
