"""Norms over the channels of a token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspan.dtypes import at_least_float32
from longspan.ops.norm import Activation, rms_norm_gated
from longspan.tracing import unseen_by_checkpointing


class _Norm(nn.Module):
    """A norm with a weight per channel, one at first."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def reset_parameters(self) -> None:
        """Set the weight to one."""
        nn.init.ones_(self.weight)


class RMSNorm(_Norm):
    """x / rms(x) · weight over the last dimension (arXiv 1910.07467), computed in float32 or wider."""

    @unseen_by_checkpointing
    def forward(self, x: Tensor) -> Tensor:
        # PyTorch computes it in place, bit by bit.
        wide = at_least_float32(x)
        return F.rms_norm(wide, self.weight.shape, self.weight.to(wide.dtype), self.eps).to(x.dtype)


class GatedRMSNorm(_Norm):
    """x / rms(x) · weight ⊙ act(gate) over the last dimension: see `longspan.rms_norm_gated`."""

    def __init__(self, size: int, eps: float, activation: Activation = "silu") -> None:
        super().__init__(size, eps)
        self.activation: Activation = activation

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return rms_norm_gated(x, gate, self.weight, self.eps, self.activation)


def group_norm(x: Tensor, eps: float) -> Tensor:
    """(x − mean) / √(variance + eps) over the last dimension, the channels of a head (arXiv 1803.08494); without weights.

    In the dtype of x, computed in float32 or wider.
    """
    wide = at_least_float32(x)
    return F.layer_norm(wide, wide.shape[-1:], eps=eps).to(x.dtype)
