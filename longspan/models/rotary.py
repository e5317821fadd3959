"""Rotary embedding (arXiv 2104.09864): queries and keys turned by angles that grow with their token's position.

Shapes: B batch rows, T tokens, H heads, D head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.dtypes import at_least_float32

Rotation = tuple[Tensor, Tensor]
"""cos and sin of a rotary embedding, each [T, D / 2]."""


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's way to longer sequences (``rope_type`` ``"llama3"`` in Transformers).

    Channels that turn less than `low_freq_factor` times over `original_length` tokens turn `factor` times slower; those that turn
    more than `high_freq_factor` times stay as they are; between the two the shares of both are linear in the number of turns. The
    formula is that of the models' own code (``apply_scaling`` of meta-llama/llama-models).
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int

    def scaled(self, angles: Tensor) -> Tensor:
        """The angles a token, float64 ``[D / 2]``, of those of a rotary embedding that is not scaled."""
        turns = self.original_length * angles / (2 * math.pi)
        kept = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return angles * (kept + (1 - kept) / self.factor)


def rotation(
    positions: Tensor, size: int, theta: float, dtype: torch.dtype, scaling: RopeScaling | None = None
) -> Rotation:
    """The angles of the tokens at `positions`.

    Args:
        positions: int64 ``[T]``, each token's position in its document.
        size: head dimension D, even.
        theta: base of the frequencies ``theta ** (-2i / D)``.
        dtype: of the result, float32 or float64.
        scaling: what becomes of the frequencies; None leaves them.

    The angles are computed in float64: in float32, those of a token at position 10^6 would be off by 0.06.
    """
    exponents = torch.arange(0, size, 2, dtype=torch.float64, device=positions.device) / size
    angles = theta**-exponents
    return _rotation(positions, angles if scaling is None else scaling.scaled(angles), dtype)


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
