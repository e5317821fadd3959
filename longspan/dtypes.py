"""Which dtype is computed in: float32, or float64 for float64."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states, sums and gates beside activations of `dtype`: float64 for float64, else float32."""
    return torch.promote_types(dtype, torch.float32)


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32 if its dtype is narrower."""
    return x.to(accumulation_dtype(x.dtype))
