"""Gradients that are summed over chunks of tokens, or scaled, without a rounding in between."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from longspan.dtypes import accumulation_dtype


def chunks_of(num_tokens: int, chunk_size: int) -> Iterator[slice]:
    """Runs of `chunk_size` tokens, and a shorter one at the end."""
    return (slice(first, first + chunk_size) for first in range(0, num_tokens, chunk_size))


def add_product(total: Tensor, first: Tensor, second: Tensor) -> None:
    """total ``[a, b]`` += firstᵀ second, of ``[n, a]`` and ``[n, b]``; total may be wider than they are."""
    if total.dtype == first.dtype:
        total.addmm_(first.t(), second)
    else:
        total.add_(first.t() @ second)


def times_number(x: Tensor, number: Tensor, chunk_size: int) -> Tensor:
    """x ``[..., D]`` times a 0-dimensional tensor, in the dtype of x; multiplied in float32 at least, a chunk of rows at a time."""
    if x.dtype == accumulation_dtype(x.dtype):
        return x * number
    given = x.reshape(-1, x.shape[-1])
    out = torch.empty_like(given)
    for rows in chunks_of(len(given), chunk_size):
        # PyTorch would round the number to the dtype of x first.
        out[rows] = given[rows].float() * number
    return out.view(x.shape)
