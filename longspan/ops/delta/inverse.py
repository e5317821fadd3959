"""Inverses of unit lower triangular matrices, by matrix products alone."""

from __future__ import annotations

import torch
from torch import Tensor


def inverse(lower: Tensor) -> Tensor:
    """(I + L)⁻¹ for strictly lower L ``[..., C, C]``.

    Halves recurse; below 9 rows the Neumann product (I − L)(I + L²)(I + L⁴) is exact, and the powers stay so small that nothing
    cancels even where all keys are alike.
    """
    size = lower.shape[-1]
    if size <= 8:
        identity = torch.eye(size, dtype=lower.dtype, device=lower.device)
        result, power = identity - lower, lower @ lower
        for _ in range((size - 1).bit_length() - 1):
            result = result + result @ power
            power = power @ power
        return result
    half = size // 2
    first, last = lower[..., :half, :half], lower[..., half:, half:]
    result = torch.zeros_like(lower)
    if 2 * half == size:
        inverse_first, inverse_last = inverse(torch.stack([first, last]))
    else:
        inverse_first, inverse_last = inverse(first), inverse(last)
    result[..., :half, :half], result[..., half:, half:] = inverse_first, inverse_last
    result[..., half:, :half] = -inverse_last @ (lower[..., half:, :half] @ inverse_first)
    return result
