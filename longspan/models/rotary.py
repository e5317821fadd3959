"""Rotary embedding (arXiv 2104.09864): queries and keys turned by angles that grow with their token's position.

Shapes: B batch rows, T tokens, H heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longspan.dtypes import at_least_float32

Rotation = tuple[Tensor, Tensor]
"""cos and sin of a rotary embedding, each [T, D / 2]."""


def rotation(positions: Tensor, size: int, theta: float, dtype: torch.dtype) -> Rotation:
    """The angles of the tokens at `positions`.

    Args:
        positions: int64 ``[T]``, each token's position in its document.
        size: head dimension D, even.
        theta: base of the frequencies ``theta ** (-2i / D)``.
        dtype: of the result, float32 or float64.

    The angles are computed in float64: in float32, those of a token at position 10^6 would be off by 0.06.
    """
    exponents = torch.arange(0, size, 2, dtype=torch.float64, device=positions.device) / size
    return _rotation(positions, theta**-exponents, dtype)


def rotation_by(positions: Tensor, angles: Sequence[float], dtype: torch.dtype) -> Rotation:
    """As `rotation`, with the angle a token of each of D / 2 pairs of channels."""
    return _rotation(positions, torch.tensor(angles, dtype=torch.float64, device=positions.device), dtype)


def _rotation(positions: Tensor, angles: Tensor, dtype: torch.dtype) -> Rotation:
    turned = positions.double().unsqueeze(-1) * angles
    return turned.cos().to(dtype), turned.sin().to(dtype)


def rotate(x: Tensor, angles: Rotation) -> Tensor:
    """`x` ``[B, T, H, D]`` with channels i and i + D/2 turned by the i-th angle of their token."""
    cos, sin = (part.unsqueeze(-2) for part in angles)
    first, second = at_least_float32(x).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
