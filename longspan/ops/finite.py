"""What is NaN or infinite, and what it reaches inside a chunk.

A token reads itself and earlier tokens of its chunk by a product with scores that are zero above the diagonal. But 0 · NaN is NaN:
through that product a later token would reach earlier ones. So where anything is not finite, products inside chunks are formed
from what is finite, and what the recurrence would make NaN is made NaN afterwards. States need no such care: they hold what
earlier tokens wrote, and later tokens alone read them.

Shapes: as in `longspan.ops.matrices`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.ops.tiling import ChunkBlock


def all_finite(*tensors: Tensor) -> bool:
    """Whether no number is NaN or infinite; False also where it is not known.

    A sum is one pass, and finite only if all its terms are. On other devices than the CPU looking would make the host wait.
    """
    return all(x.device.type == "cpu" and bool(x.detach().sum().isfinite()) for x in tensors)


def rows_stay_apart(x: Tensor) -> bool:
    """Whether a matrix product keeps what is not finite in one row of ``x`` out of the others.

    Not so in bfloat16 on CPUs with matrix tiles (AMX; oneDNN in PyTorch 2.13): where the inner size fills no tile, numbers of the
    next row are read behind a row, and multiplied by zero.
    """
    return x.device.type != "cpu" or x.dtype != torch.bfloat16 or all_finite(x)


def finite_part(x: Tensor) -> Tensor:
    """`x` with zeros for what is not finite."""
    return torch.where(x.isfinite(), x, 0.0)


def not_finite(x: Tensor, block: ChunkBlock, num_heads: int) -> Tensor:
    """Where ``x [B, T, H_k, D]`` is not finite at the block's tokens, ``[n, B, H, c, D]``; False at padding."""
    mask = block.without_padding(~block.take(x).isfinite(), False)
    return mask.repeat_interleave(num_heads // mask.shape[2], dim=2)


def from_then_on(mask: Tensor) -> Tensor:
    """Which tokens ``[n, B, H, c, D]`` stand at or behind a marked one of their chunk."""
    return mask.cumsum(3) > 0


def until_then(mask: Tensor) -> Tensor:
    """Which tokens stand at or before a marked one."""
    return from_then_on(mask.flip(3)).flip(3)


@dataclass(frozen=True)
class Harm:
    """Where a block's inputs and upstream gradients are not finite, and which gradients of the inside of chunks cannot be.

    q, k ``[n, B, H, c, K]``, v and grad ``[n, B, H, c, V]``: of `not_finite`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor

    @classmethod
    def of(cls, block: ChunkBlock, num_heads: int, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> Harm:
        return cls(*(not_finite(x, block, num_heads) for x in (q, k, v, grad)))

    @property
    def of_query(self) -> Tensor:
        """∂q_t = Σ_{s ≤ t} (∂o_t · v_s) k_s."""
        return _any(self.grad) | from_then_on(_any(self.v)) | from_then_on(self.k)

    @property
    def of_key(self) -> Tensor:
        """∂k_s = Σ_{t ≥ s} (∂o_t · v_s) q_t."""
        return _any(self.v) | until_then(_any(self.grad)) | until_then(self.q)

    @property
    def of_value(self) -> Tensor:
        """∂v_s = Σ_{t ≥ s} (q_t · k_s) ∂o_t."""
        return _any(self.k) | until_then(_any(self.q)) | until_then(self.grad)

    def of_gate(self, per_channel: bool) -> Tensor:
        """∂g_t holds what tokens at or behind t read of those before it, ``[n, B, H, c, D]``."""
        earlier, later = self.k | _any(self.v), self.q | _any(self.grad)
        if not per_channel:
            earlier, later = _any(earlier), _any(later)
        before = torch.zeros_like(earlier)
        before[:, :, :, 1:] = from_then_on(earlier)[:, :, :, :-1]
        return before | until_then(later)


def _any(mask: Tensor) -> Tensor:
    return mask.any(-1, keepdim=True)
