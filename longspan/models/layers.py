"""The parts of Llama 3's block that know nothing of the sequence: norm, feed-forward, rotary embedding.

Shapes: B batch rows, T tokens, C channels, H heads, D head dimension.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspan.dtypes import at_least_float32
from longspan.ops.norm import rms_norm_gated
from longspan.tracing import unseen_by_checkpointing


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dimension (arXiv 1910.07467), computed in float32 or wider."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    @unseen_by_checkpointing
    def forward(self, x: Tensor) -> Tensor:
        # PyTorch computes it in place, bit by bit.
        wide = at_least_float32(x)
        return F.rms_norm(wide, self.weight.shape, self.weight.to(wide.dtype), self.eps).to(x.dtype)


class GatedRMSNorm(nn.Module):
    """x / rms(x) · weight ⊙ silu(gate) over the last dimension: see `longspan.rms_norm_gated`."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return rms_norm_gated(x, gate, self.weight, self.eps)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) ⊙ up(x)) (arXiv 2002.05202)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden_dim, bias=False)
        self.up_proj = nn.Linear(dim, hidden_dim, bias=False)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


Rotation = tuple[Tensor, Tensor]
"""cos and sin of a rotary embedding, each [T, D / 2]."""


def rotation(positions: Tensor, size: int, theta: float, dtype: torch.dtype) -> Rotation:
    """Rotary embedding's angles (arXiv 2104.09864).

    Args:
        positions: int64 ``[T]``, each token's position in its document.
        size: head dimension D, even.
        theta: base of the frequencies ``theta ** (-2i / D)``.
        dtype: of the result, float32 or float64.

    The angles are computed in float64: in float32, those of a token at position 10^6 would be off by 0.06.
    """
    exponents = torch.arange(0, size, 2, dtype=torch.float64, device=positions.device) / size
    angles = positions.double().unsqueeze(-1) * theta**-exponents
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """`x` ``[B, T, H, D]`` with channels i and i + D/2 turned by the i-th angle of their token."""
    cos, sin = (part.unsqueeze(-2) for part in by)
    first, second = at_least_float32(x).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
