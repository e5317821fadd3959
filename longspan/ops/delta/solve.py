"""The triangular system of a block's chunks, (I + L) u = β (v − k̂ S), and what its inverse makes of rows.

Shapes: as in `longspan.ops.delta.call`.

Where an entry of L exceeds 1, as β above 1 makes it, T = (I + L)⁻¹ may be far from small: then L, T and the products with T are
float64. In float32, where keys resemble each other, they would have two digits less than token by token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.ops.delta.call import (
    DeltaCall,
    Keys,
    block_keys,
    poison_rows,
    put_product,
    put_rows,
    scores,
    take_block,
)
from longspan.ops.delta.inverse import unit_lower_inverse
from longspan.ops.finite import finite_part, from_then_on
from longspan.ops.matrices import batched_product
from longspan.ops.tiling import ChunkBlock


@dataclass(frozen=True)
class System:
    """Of one block: its keys, T ``[n, B, H, c, c]``, and T with its columns times β, in the same dtype.

    bad: tokens whose key, β or row of L is not finite, ``[n, B, H, c, 1]``; None where there are none.
    """

    keys: Keys
    inverse: Tensor
    weighted: Tensor
    bad: Tensor | None

    def put(self, target: Tensor, block: ChunkBlock, rows: Tensor, finite: bool) -> None:
        """Write T (β x) for ``rows x [n, B, H, c, D]`` to the block's rows of ``target [N, B, H, C, D]``.

        finite: x is known to be finite wherever keys and β are.
        """
        bad = self.bad
        if not finite or bad is not None:
            bad_rows = ~rows.isfinite()
            rows, bad = finite_part(rows), bad_rows if bad is None else bad_rows | bad
        if self.weighted.dtype == target.dtype:
            put_product(target, block, self.weighted, rows)
        else:
            put_rows(target, block, batched_product(self.weighted, rows.to(self.weighted.dtype)))
        if bad is not None:
            poison_rows(target, block, from_then_on(bad))


def solve(call: DeltaCall, block: ChunkBlock, k: Tensor, beta: Tensor, g: Tensor | None) -> System:
    """The system of one block."""
    keys = block_keys(call, block, k, g, None)
    strength = take_block(call, block, beta.unsqueeze(-1))
    lower = _lower(call, block, g, keys, strength, call.dtype)
    if is_at_most_one(lower):
        inverted = unit_lower_inverse(lower)
        return System(keys, inverted, inverted * strength.mT, None)
    if call.dtype != torch.float64 and not is_at_most_one(finite_part(lower)):
        lower = _lower(call, block, g, keys, strength, torch.float64)
    good = strength.isfinite()
    for x in (lower, keys.ahead):
        good &= x.isfinite().all(-1, keepdim=True)
    inverted = unit_lower_inverse(finite_part(lower))
    is_known_good = good.device.type == "cpu" and bool(good.all())
    return System(keys, inverted, inverted * finite_part(strength).mT, None if is_known_good else ~good)


def _lower(
    call: DeltaCall, block: ChunkBlock, g: Tensor | None, keys: Keys, strength: Tensor, dtype: torch.dtype
) -> Tensor:
    """L = tril(β k̂ k̃ᵀ, −1) in `dtype`."""
    plain, ahead, behind = (x.to(dtype) for x in (keys.plain, keys.ahead, keys.behind))
    products, _ = scores(call, block, g, plain, plain, ahead, behind)
    # Above the diagonal, factors about the middle of a chunk may overflow; nothing there may be multiplied.
    return products.tril_(-1).mul_(strength)


def is_at_most_one(lower: Tensor) -> bool:
    """Whether no entry exceeds 1 or is NaN; False on devices where looking would make the host wait."""
    if not lower.numel():
        return True
    if lower.device.type != "cpu":
        return False
    smallest, largest = lower.aminmax()
    return float(smallest) >= -1.0 and float(largest) <= 1.0
