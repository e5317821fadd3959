"""The short causal convolution by kernels: inside a rank's tokens, and for the head rows, whose taps reach before their piece.

Shapes: B batch rows, T tokens of this rank, C channels, W taps, n heads, R head rows; see `longspan.ops.convolution`.

Each is an operator of PyTorch with its gradient, so that `torch.compile` keeps one graph. The convolution is bound by memory:
forward reads x and writes y, backward reads x and ∂y and writes ∂x. What backward needs of the pre-activation z it computes again,
W² multiply-adds per number, from rows that lie in the cache. Gradients of the parameters are summed tile by tile and then over
tiles, in one order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from longspan.layout import SequenceLayout
from longspan.ops.triton.dispatch import Operator, differentiable
from longspan.ops.triton.launch import cdiv, contiguous_rows, power_of_2

# Of a tile: rows and columns, and the warps that compute it.
TOKENS, CHANNELS, NUM_WARPS = 32, 64, 8


@triton.jit
def _pre_activation(
    x, weight, bias, x_token, tokens, before, after, channels, is_channel,
    SHIFT: tl.constexpr, HAS_BIAS: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """z of the tokens SHIFT behind `tokens`, as if nothing stood before their piece.

    before, after: how many tokens of its piece stand before and behind each of `tokens`, up to W − 1; −1 where there is no token.
    """
    z = tl.zeros([tokens.shape[0], channels.shape[0]], tl.float32)
    if HAS_BIAS:
        z += tl.load(bias + channels, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    for tap in tl.static_range(W):
        inside = after >= SHIFT - tap if tap <= SHIFT else before >= tap - SHIFT
        values = tl.load(
            x + (tokens + (SHIFT - tap))[:, None] * x_token + channels[None, :],
            mask=inside[:, None] & is_channel[None, :],
            other=0.0,
        )
        factor = tl.load(weight + channels * W + (W - 1 - tap), mask=is_channel, other=0.0)
        z += values.to(tl.float32) * factor.to(tl.float32)[None, :]
    return z


@triton.jit
def _silu_slope(z):
    s = tl.sigmoid(z)
    return s * (1.0 + z * (1.0 - s))


@triton.jit
def inside_kernel(
    x, weight, bias, y, z_heads, rows, num_tokens, num_channels, num_head_rows, x_batch, x_token,
    HAS_BIAS: tl.constexpr, HAS_HEADS: tl.constexpr, SILU: tl.constexpr,
    W: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """y ``[B, T, C]`` of ``x [B, T, C]``, and z of the head rows, float32 ``[B, R, C]``.

    rows: int32 ``[3, T]``, see `Rows`. Program (tile of tokens, block of channels; batch).
    """
    blocks = tl.cdiv(num_channels, BC)
    tile, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    batch = tl.program_id(1).to(tl.int64)
    tokens = (tile * BT + tl.arange(0, BT)).to(tl.int64)
    channels = block * BC + tl.arange(0, BC)
    is_token, is_channel = tokens < num_tokens, channels < num_channels
    before = tl.load(rows + tokens, mask=is_token, other=-1)
    # Taps look back alone: of what stands behind, only that the token itself is there.
    after = tl.where(is_token, 0, -1)
    x += batch * x_batch
    z = _pre_activation(x, weight, bias, x_token, tokens, before, after, channels, is_channel, 0, HAS_BIAS, W)
    if HAS_HEADS:
        head_row = tl.load(rows + (tokens + 2 * num_tokens), mask=is_token, other=-1).to(tl.int64)
        tl.store(
            z_heads + (batch * num_head_rows + head_row)[:, None] * num_channels + channels[None, :],
            z,
            mask=(head_row >= 0)[:, None] & is_channel[None, :],
        )
    if SILU:
        z *= tl.sigmoid(z)
    target = y + (batch * num_tokens + tokens)[:, None] * num_channels + channels[None, :]
    tl.store(target, z.to(y.dtype.element_ty), mask=is_token[:, None] & is_channel[None, :])


@triton.jit
def inside_backward_kernel(
    x, weight, bias, grad_y, grad_z_heads, grad_x, sums, rows, num_tokens, num_channels, num_head_rows,
    x_batch, x_token, grad_batch, grad_token,
    HAS_BIAS: tl.constexpr, HAS_HEADS: tl.constexpr, SILU: tl.constexpr, NEEDS_X: tl.constexpr, NEEDS_SUMS: tl.constexpr,
    W: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """∂x ``[B, T, C]``, and each tile's share of ∂weight (W rows) and ∂bias (the last one), ``[B · tiles, W + 1, C]``.

    Program (tile of tokens, block of channels; batch).
    """
    blocks = tl.cdiv(num_channels, BC)
    tile, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    batch = tl.program_id(1).to(tl.int64)
    tokens = (tile * BT + tl.arange(0, BT)).to(tl.int64)
    channels = block * BC + tl.arange(0, BC)
    is_token, is_channel = tokens < num_tokens, channels < num_channels
    before = tl.load(rows + tokens, mask=is_token, other=-1)
    after = tl.load(rows + (tokens + num_tokens), mask=is_token, other=-1)
    x += batch * x_batch
    grad_y += batch * grad_batch
    result = tl.zeros([BT, BC], tl.float32)
    for shift in tl.static_range(W if NEEDS_X else 1):
        # ∂z of the token `shift` behind: from ∂y, but at head rows from the gradient of their z.
        of_y = after >= shift
        if HAS_HEADS:
            head_row = tl.load(rows + (tokens + 2 * num_tokens + shift), mask=of_y, other=-1).to(tl.int64)
            of_y = of_y & (head_row < 0)
        grad_z = tl.load(
            grad_y + (tokens + shift)[:, None] * grad_token + channels[None, :],
            mask=of_y[:, None] & is_channel[None, :],
            other=0.0,
        ).to(tl.float32)
        if SILU:
            z = _pre_activation(
                x, weight, bias, x_token, tokens, before, after, channels, is_channel, shift, HAS_BIAS, W
            )
            grad_z = tl.where(of_y[:, None], grad_z * _silu_slope(z), 0.0)
        if HAS_HEADS:
            grad_z += tl.load(
                grad_z_heads + (batch * num_head_rows + head_row)[:, None] * num_channels + channels[None, :],
                mask=(head_row >= 0)[:, None] & is_channel[None, :],
                other=0.0,
            )
        if NEEDS_X:
            factor = tl.load(weight + channels * W + (W - 1 - shift), mask=is_channel, other=0.0)
            result += grad_z * factor.to(tl.float32)[None, :]
        if NEEDS_SUMS:
            if shift == 0:
                share = sums + (batch * (tl.num_programs(0) // blocks) + tile) * (W + 1) * num_channels + channels
                tl.store(share + W * num_channels, tl.sum(grad_z, axis=0), mask=is_channel)
                for tap in tl.static_range(W):
                    values = tl.load(
                        x + (tokens - tap)[:, None] * x_token + channels[None, :],
                        mask=(before >= tap)[:, None] & is_channel[None, :],
                        other=0.0,
                    )
                    tl.store(
                        share + (W - 1 - tap) * num_channels,
                        tl.sum(grad_z * values.to(tl.float32), axis=0),
                        mask=is_channel,
                    )
    if NEEDS_X:
        target = grad_x + (batch * num_tokens + tokens)[:, None] * num_channels + channels[None, :]
        tl.store(target, result.to(grad_x.dtype.element_ty), mask=is_token[:, None] & is_channel[None, :])


@triton.jit
def heads_kernel(
    z_heads, before, weight, y_rows, heads, num_channels, num_head_rows,
    SILU: tl.constexpr, W: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """y of the head rows ``[B, R, C]``: what the tokens before the heads, ``[n, B, W-1, C]``, add to their z.

    heads: int32 ``[n, 2]``, the first row and the number of rows of each. Program (head, block of channels; batch).
    """
    blocks = tl.cdiv(num_channels, BC)
    head, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    batch = tl.program_id(1).to(tl.int64)
    channels, places = block * BC + tl.arange(0, BC), tl.arange(0, BW)
    is_channel = channels < num_channels
    first, number = tl.load(heads + 2 * head), tl.load(heads + 2 * head + 1)
    before += (head * tl.num_programs(1) + batch) * (W - 1) * num_channels
    tokens = tl.load(
        before + places[:, None] * num_channels + channels[None, :],
        mask=(places < W - 1)[:, None] & is_channel[None, :],
        other=0.0,
    ).to(tl.float32)
    for offset in tl.static_range(W - 1):
        if number > offset:
            seen = (places >= offset) & (places < W - 1)
            factors = tl.load(
                weight + channels[None, :] * W + (places - offset)[:, None],
                mask=seen[:, None] & is_channel[None, :],
                other=0.0,
            ).to(tl.float32)
            row = (batch * num_head_rows + first + offset) * num_channels + channels
            added = tl.where(seen[:, None], tokens * factors, 0.0)
            z = tl.load(z_heads + row, mask=is_channel, other=0.0) + tl.sum(added, axis=0)
            if SILU:
                z *= tl.sigmoid(z)
            tl.store(y_rows + row, z.to(y_rows.dtype.element_ty), mask=is_channel)


@triton.jit
def heads_backward_kernel(
    z_heads, before, weight, grad_rows, grad_z_heads, grad_before, sums, heads, num_channels, num_head_rows,
    SILU: tl.constexpr, W: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Gradients of z_heads and of the tokens before the heads, and each head's share of ∂weight, ``[n · B, W-1, C]``.

    Program (head, block of channels; batch).
    """
    blocks = tl.cdiv(num_channels, BC)
    head, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    batch = tl.program_id(1).to(tl.int64)
    channels, places = block * BC + tl.arange(0, BC), tl.arange(0, BW)
    is_channel = channels < num_channels
    first, number = tl.load(heads + 2 * head), tl.load(heads + 2 * head + 1)
    start = (head * tl.num_programs(1) + batch) * (W - 1) * num_channels
    target = start + places[:, None] * num_channels + channels[None, :]
    is_target = (places < W - 1)[:, None] & is_channel[None, :]
    tokens = tl.load(before + target, mask=is_target, other=0.0).to(tl.float32)
    grad_tokens = tl.zeros([BW, BC], tl.float32)
    share = tl.zeros([BW, BC], tl.float32)
    for offset in tl.static_range(W - 1):
        if number > offset:
            seen = (places >= offset) & (places < W - 1)
            factors = tl.load(
                weight + channels[None, :] * W + (places - offset)[:, None],
                mask=seen[:, None] & is_channel[None, :],
                other=0.0,
            ).to(tl.float32)
            row = (batch * num_head_rows + first + offset) * num_channels + channels
            grad = tl.load(grad_rows + row, mask=is_channel, other=0.0).to(tl.float32)
            if SILU:
                added = tl.where(seen[:, None], tokens * factors, 0.0)
                z = tl.load(z_heads + row, mask=is_channel, other=0.0) + tl.sum(added, axis=0)
                grad = tl.where(is_channel, grad * _silu_slope(z), 0.0)
            tl.store(grad_z_heads + row, grad, mask=is_channel)
            grad_tokens += tl.where(seen[:, None], grad[None, :] * factors, 0.0)
            # Column m of the weight is multiplied with the token m places behind the row's first one.
            is_tap = places + offset < W - 1
            values = tl.load(
                before + target + offset * num_channels, mask=is_tap[:, None] & is_channel[None, :], other=0.0
            ).to(tl.float32)
            share += tl.where(is_tap[:, None] & is_channel[None, :], grad[None, :] * values, 0.0)
    tl.store(grad_before + target, grad_tokens.to(grad_before.dtype.element_ty), mask=is_target)
    tl.store(sums + target, share, mask=is_target)


def _grid(num_tiles: int, x: Tensor) -> tuple[int, int]:
    return num_tiles * cdiv(x.shape[-1], CHANNELS), x.shape[0]


def _inside(
    x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, num_head_rows: int, silu: bool
) -> tuple[Tensor, Tensor]:
    """The convolution of a rank's tokens, as if nothing stood before its pieces.

    | | shape | |
    |---|---|---|
    | x, y | [B, T, C] | x with channels side by side |
    | weight, bias | [C, W], [C] or None | contiguous |
    | rows | [3, T] int32 | see `Rows` |
    | z_heads | [B, R, C] | z of the head rows, float32; their y is computed without what it lacks |

    Forward and backward: as in `longspan.ops.convolution`.
    """
    batch, num_tokens, num_channels = x.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    z_heads = x.new_empty(batch, num_head_rows, num_channels, dtype=torch.float32)
    inside_kernel[_grid(cdiv(num_tokens, TOKENS), x)](
        x, weight, bias, y, z_heads, rows, num_tokens, num_channels, num_head_rows, x.stride(0), x.stride(1),
        HAS_BIAS=bias is not None, HAS_HEADS=num_head_rows > 0, SILU=silu,
        W=weight.shape[1], BT=TOKENS, BC=CHANNELS, num_warps=NUM_WARPS,
    )  # fmt: skip
    return y, z_heads


def _inside_fake(x, weight, bias, rows, num_head_rows, silu):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, x.new_empty(x.shape[0], num_head_rows, x.shape[2], dtype=torch.float32)


def _inside_backward(
    grad_y: Tensor,
    grad_z_heads: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    silu: bool,
    needs_x: bool,
    needs_sums: bool,
) -> tuple[Tensor, Tensor]:
    """∂x (empty unless `needs_x`), and ∂weight and ∂bias ``[W + 1, C]``, float32 (empty unless `needs_sums`)."""
    batch, num_tokens, num_channels = x.shape
    num_tiles, taps = cdiv(num_tokens, TOKENS), weight.shape[1]
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_x else x.new_empty(0)
    num_sums = batch * num_tiles if needs_sums else 0
    sums = x.new_empty(num_sums, taps + 1, num_channels, dtype=torch.float32)
    inside_backward_kernel[_grid(num_tiles, x)](
        x, weight, bias, grad_y, grad_z_heads, grad_x, sums, rows, num_tokens, num_channels, grad_z_heads.shape[1],
        x.stride(0), x.stride(1), grad_y.stride(0), grad_y.stride(1),
        HAS_BIAS=bias is not None, HAS_HEADS=grad_z_heads.shape[1] > 0, SILU=silu, NEEDS_X=needs_x, NEEDS_SUMS=needs_sums,
        W=taps, BT=TOKENS, BC=CHANNELS, num_warps=NUM_WARPS,
    )  # fmt: skip
    return grad_x, sums.sum(0) if needs_sums else x.new_empty(0, dtype=torch.float32)


def _inside_backward_fake(grad_y, grad_z_heads, x, weight, bias, rows, silu, needs_x, needs_sums):
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_x else x.new_empty(0)
    shape = (weight.shape[1] + 1, x.shape[2]) if needs_sums else (0,)
    return grad_x, x.new_empty(shape, dtype=torch.float32)


def _setup_inside(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, rows, _, silu = inputs
    ctx.save_for_backward(x, weight, bias, rows)
    ctx.silu = silu


def _inside_gradients(
    ctx: Any, backward: Callable[..., Any], grad_y: Tensor, grad_z_heads: Tensor
) -> tuple[Tensor | None, ...]:
    x, weight, bias, rows = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    grad_x, sums = backward(
        contiguous_rows(grad_y), grad_z_heads.contiguous(), x, weight, bias, rows,
        ctx.silu, needs_x, needs_weight or needs_bias,
    )  # fmt: skip
    return (
        grad_x if needs_x else None,
        sums[:-1].t().to(weight.dtype).contiguous() if needs_weight else None,
        sums[-1].to(weight.dtype) if needs_bias else None,
        None,
        None,
        None,
    )


INSIDE = Operator("longspan::convolution_inside", _inside, _inside_fake)
convolution_inside = differentiable(
    INSIDE,
    Operator("longspan::convolution_inside_backward", _inside_backward, _inside_backward_fake),
    _setup_inside,
    _inside_gradients,
)


def _heads(z_heads: Tensor, before: Tensor, weight: Tensor, heads: Tensor, silu: bool) -> Tensor:
    """y of the head rows.

    | | shape | |
    |---|---|---|
    | z_heads | [B, R, C] | from `convolution_inside` |
    | before | [n, B, W-1, C] | the tokens before each head, the nearest last; contiguous |
    | weight | [C, W] | contiguous |
    | heads | [n, 2] int32 | first row and number of rows of each head |
    | y_rows | [B, R, C] | the dtype of `before` |

    Forward: z_{head + o} += Σ_{i ≥ o} weight[:, i − o] ⊙ before_i; y = act(z). Backward: dz = dy ⊙ act'(z);
    dbefore_i = Σ_{o ≤ i} weight[:, i − o] ⊙ dz_o; dweight[:, m] = Σ dz_o ⊙ before_{o + m}.
    """
    y_rows = before.new_empty(z_heads.shape)
    taps = weight.shape[1]
    heads_kernel[_grid(heads.shape[0], z_heads)](
        z_heads, before, weight, y_rows, heads, z_heads.shape[2], z_heads.shape[1],
        SILU=silu, W=taps, BW=power_of_2(taps - 1), BC=CHANNELS, num_warps=1,
    )  # fmt: skip
    return y_rows


def _heads_fake(z_heads, before, weight, heads, silu):
    return before.new_empty(z_heads.shape)


def _heads_backward(
    grad_rows: Tensor, z_heads: Tensor, before: Tensor, weight: Tensor, heads: Tensor, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of z_heads and before, and of all columns of the weight but the last, ``[W-1, C]`` in float32."""
    grad_z_heads, grad_before = torch.empty_like(z_heads), torch.empty_like(before)
    taps = weight.shape[1]
    sums = z_heads.new_empty(before.shape[0] * before.shape[1], taps - 1, before.shape[3])
    heads_backward_kernel[_grid(heads.shape[0], z_heads)](
        z_heads, before, weight, grad_rows, grad_z_heads, grad_before, sums, heads, z_heads.shape[2], z_heads.shape[1],
        SILU=silu, W=taps, BW=power_of_2(taps - 1), BC=CHANNELS, num_warps=1,
    )  # fmt: skip
    return grad_z_heads, grad_before, sums.sum(0)


def _heads_backward_fake(grad_rows, z_heads, before, weight, heads, silu):
    sums = z_heads.new_empty(weight.shape[1] - 1, weight.shape[0])
    return torch.empty_like(z_heads), torch.empty_like(before), sums


def _setup_heads(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, silu = inputs
    ctx.save_for_backward(*tensors)
    ctx.silu = silu


def _heads_gradients(ctx: Any, backward: Callable[..., Any], grad_rows: Tensor) -> tuple[Tensor | None, ...]:
    z_heads, before, weight, heads = ctx.saved_tensors
    grad_z_heads, grad_before, sums = backward(grad_rows.contiguous(), z_heads, before, weight, heads, ctx.silu)
    grad_weight = F.pad(sums, (0, 0, 0, 1)).t().to(weight.dtype).contiguous() if ctx.needs_input_grad[2] else None
    return grad_z_heads, grad_before, grad_weight, None, None


HEADS = Operator("longspan::convolution_heads", _heads, _heads_fake)
convolution_heads = differentiable(
    HEADS,
    Operator("longspan::convolution_heads_backward", _heads_backward, _heads_backward_fake),
    _setup_heads,
    _heads_gradients,
)


@dataclass(frozen=True)
class Rows:
    """What the kernels look up.

    table: int32 ``[3, T]``: for each token how many of its piece stand before it, and behind it, up to W − 1; and its number among
    the head rows, or −1. heads: int32 ``[n, 2]``, for each head the first of its rows among the head rows, and how many it has.
    """

    table: Tensor
    heads: Tensor
    num_head_rows: int


def rows_of(layout: SequenceLayout, width: int, local: Tensor, head_of: Tensor) -> Rows:
    """The rows of a layout, on the device of what is given.

    local, head_of: int64 ``[R]``, ascending local rows, and the head of each, whose rows stand side by side.
    """
    device, local, head_of = local.device, local.cpu(), head_of.cpu()
    before = [torch.arange(piece.num_tokens).clamp(max=width) for piece in layout.pieces]
    numbers = torch.full((layout.num_local_tokens,), -1)
    numbers[local] = torch.arange(len(local))
    table = torch.stack([torch.cat(before), torch.cat([rows.flip(0) for rows in before]), numbers])
    num_rows = torch.bincount(head_of)
    first = torch.full_like(num_rows, len(local)).scatter_reduce(0, head_of, torch.arange(len(local)), "amin")
    return Rows(table.int().to(device), torch.stack([first, num_rows], dim=1).int().to(device), len(local))


@dataclass(frozen=True)
class TritonConvolution:
    """A convolution's two phases by kernels."""

    rows: Rows
    silu: bool

    def inside(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """y ``[B, T, C]`` as if nothing stood before this rank's pieces, and z of the head rows."""
        bias = None if bias is None else bias.contiguous()
        y, z_heads = convolution_inside(
            contiguous_rows(x), weight.contiguous(), bias, self.rows.table, self.rows.num_head_rows, self.silu
        )
        return y, z_heads

    def of_heads(self, z_heads: Tensor, before: Tensor, weight: Tensor) -> Tensor:
        """y of the head rows, ``[B, R, C]``, with the tokens before the heads, ``[n, B, W-1, C]``."""
        rows: Tensor = convolution_heads(z_heads, before.contiguous(), weight.contiguous(), self.rows.heads, self.silu)
        return rows
