"""RMSNorm with an output gate by kernels: one pass over x and the gate forward, one over x, the gate and ∂y backward.

Shapes: N rows of D numbers. With r = 1 / sqrt(mean(x²) + eps), x̂ = r x, w the weight and a the activation:

    y = x̂ ⊙ w ⊙ a(gate)
    ∂gate = ∂y ⊙ x̂ ⊙ w ⊙ a'(gate),   ∂w = Σ_rows ∂y ⊙ a(gate) ⊙ x̂
    h = ∂y ⊙ a(gate) ⊙ w,            ∂x = r (h − x̂ · mean(h ⊙ x̂))

Nothing but x, the gate and w is kept between forward and backward: r is one more sum over a row that is read anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.ops.triton.dispatch import Operator, differentiable
from longspan.ops.triton.launch import cdiv, power_of_2

# Numbers of a tile, and the most programs, each of which leaves one row of ∂w to be summed.
TILE, MAX_PROGRAMS = 4096, 1024


@triton.jit
def _activated(gate, SILU: tl.constexpr):
    """a(gate) and a'(gate)."""
    s = tl.sigmoid(gate)
    if SILU:
        return gate * s, s * (1.0 + gate * (1.0 - s))
    else:
        return s, s * (1.0 - s)


@triton.jit
def _normalised(x, is_row, size, eps):
    """x̂ and r of rows ``[R, D]``, zero behind `size`; of rows that are not there x̂ is zero, without eps too."""
    r = 1.0 / tl.sqrt(tl.where(is_row, tl.sum(x * x, axis=1) / size + eps, 1.0))
    return x * r[:, None], r


@triton.jit
def forward_kernel(
    x, gate, weight, y, num_rows, size, eps, SILU: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """y of ROWS rows. Program (tile of rows)."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BD)
    mask = (rows < num_rows)[:, None] & (columns < size)[None, :]
    tile = rows[:, None] * size + columns[None, :]
    w = tl.load(weight + columns, mask=columns < size, other=0.0).to(tl.float32)
    normal, _ = _normalised(tl.load(x + tile, mask=mask, other=0.0).to(tl.float32), rows < num_rows, size, eps)
    open_by, _ = _activated(tl.load(gate + tile, mask=mask, other=0.0).to(tl.float32), SILU)
    tl.store(y + tile, (normal * w[None, :] * open_by).to(y.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    x, gate, weight, grad_y, grad_x, grad_gate, sums, num_rows, size, eps, num_tiles,
    SILU: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """∂x and ∂gate of `num_tiles` tiles of ROWS rows, and their share of ∂w, a row of ``sums [programs, D]``.

    Program (its tiles).
    """
    columns = tl.arange(0, BD)
    w = tl.load(weight + columns, mask=columns < size, other=0.0).to(tl.float32)
    share = tl.zeros([BD], tl.float32)
    for step in range(num_tiles):
        rows = (tl.program_id(0).to(tl.int64) * num_tiles + step) * ROWS + tl.arange(0, ROWS)
        mask = (rows < num_rows)[:, None] & (columns < size)[None, :]
        tile = rows[:, None] * size + columns[None, :]
        normal, r = _normalised(tl.load(x + tile, mask=mask, other=0.0).to(tl.float32), rows < num_rows, size, eps)
        open_by, slope = _activated(tl.load(gate + tile, mask=mask, other=0.0).to(tl.float32), SILU)
        grad = tl.load(grad_y + tile, mask=mask, other=0.0).to(tl.float32)
        of_weight = grad * open_by
        share += tl.sum(of_weight * normal, axis=0)
        of_normal = of_weight * w[None, :]
        along = tl.sum(of_normal * normal, axis=1) / size
        tl.store(
            grad_x + tile, ((of_normal - normal * along[:, None]) * r[:, None]).to(grad_x.dtype.element_ty), mask=mask
        )
        tl.store(grad_gate + tile, (grad * normal * w[None, :] * slope).to(grad_gate.dtype.element_ty), mask=mask)
    tl.store(sums + tl.program_id(0) * size + columns, share, mask=columns < size)


def _tile_sizes(x: Tensor) -> tuple[int, dict[str, int]]:
    """The number of tiles of all rows of x, and their sizes."""
    size = x.shape[-1]
    block = power_of_2(size)
    rows = max(1, TILE // block)
    return cdiv(x.numel() // size, rows), {"ROWS": rows, "BD": block, "num_warps": 8 if block > 2048 else 4}


def _forward(x: Tensor, gate: Tensor, weight: Tensor, eps: float, silu: bool) -> Tensor:
    """y of contiguous x and gate ``[..., D]`` and weight ``[D]``; forward and backward: see the module's page."""
    y = torch.empty_like(x)
    num_tiles, sizes = _tile_sizes(x)
    if num_tiles:
        forward_kernel[(num_tiles,)](x, gate, weight, y, x.numel() // x.shape[-1], x.shape[-1], eps, SILU=silu, **sizes)
    return y


def _forward_fake(x: Tensor, gate: Tensor, weight: Tensor, eps: float, silu: bool) -> Tensor:
    return torch.empty_like(x)


def _backward(
    grad_y: Tensor, x: Tensor, gate: Tensor, weight: Tensor, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """∂x, ∂gate, and ∂weight in float32."""
    grad_x, grad_gate = torch.empty_like(x), torch.empty_like(gate)
    num_tiles, sizes = _tile_sizes(x)
    tiles_a_program = max(1, cdiv(num_tiles, MAX_PROGRAMS))
    num_programs = cdiv(num_tiles, tiles_a_program)
    sums = torch.empty(num_programs, x.shape[-1], dtype=torch.float32, device=x.device)
    if num_programs:
        backward_kernel[(num_programs,)](
            x, gate, weight, grad_y, grad_x, grad_gate, sums, x.numel() // x.shape[-1], x.shape[-1], eps, tiles_a_program,
            SILU=silu, **sizes,
        )  # fmt: skip
    return grad_x, grad_gate, sums.sum(0)


def _backward_fake(
    grad_y: Tensor, x: Tensor, gate: Tensor, weight: Tensor, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(gate), torch.empty_like(weight, dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, backward: Callable[..., Any], grad_y: Tensor) -> tuple[Tensor | None, ...]:
    x, gate, weight = ctx.saved_tensors
    grad_x, grad_gate, grad_weight = backward(grad_y.contiguous(), x, gate, weight, ctx.eps, ctx.silu)
    return grad_x, grad_gate, grad_weight.to(weight.dtype), None, None


FORWARD = Operator("longspan::gated_norm", _forward, _forward_fake)
BACKWARD = Operator("longspan::gated_norm_backward", _backward, _backward_fake)
_node = differentiable(FORWARD, BACKWARD, _setup, _gradients)


def gated_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, silu: bool) -> Tensor:
    """``x / rms(x) · weight · act(gate)`` ``[..., D]``; act is silu or sigmoid."""
    y: Tensor = _node(x.contiguous(), gate.contiguous(), weight.contiguous(), eps, silu)
    return y
