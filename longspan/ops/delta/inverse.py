"""Inverses of unit lower triangular matrices."""

from __future__ import annotations

import torch
from torch import Tensor

_BASE = 16
"""Rows that are solved one after another; larger inverses are products of smaller ones."""


def unit_lower_inverse(lower: Tensor) -> Tensor:
    """(I + L)⁻¹ for strictly lower L ``[..., C, C]``.

    Halves recurse; from 16 rows down by forward substitution. Powers of L, whose entries grow where keys resemble each other, are
    never formed: they would cancel.
    """
    size = lower.shape[-1]
    if size <= _BASE:
        identity = torch.eye(size, dtype=lower.dtype, device=lower.device)
        return torch.linalg.solve_triangular(lower, identity, upper=False, unitriangular=True)
    half = size // 2
    first, last = lower[..., :half, :half], lower[..., half:, half:]
    result = torch.zeros_like(lower)
    if 2 * half == size:
        inverse_first, inverse_last = unit_lower_inverse(torch.stack([first, last]))
    else:
        inverse_first, inverse_last = unit_lower_inverse(first), unit_lower_inverse(last)
    result[..., :half, :half], result[..., half:, half:] = inverse_first, inverse_last
    result[..., half:, :half] = -inverse_last @ (lower[..., half:, :half] @ inverse_first)
    return result
