"""SwiGLU a chunk of tokens at a time: `chunked_swiglu`.

Shapes: N tokens (all leading dimensions together), C channels, F inner width, n tokens of a chunk.

    a = x Gᵀ, b = x Uᵀ, m = silu(a) ⊙ b, y = m Dᵀ
    ∂m = ∂y D, ∂b = ∂m ⊙ silu(a), ∂a = ∂m ⊙ b ⊙ silu'(a)        ∂x = ∂a G + ∂b U, ∂G = ∂aᵀ x, ∂U = ∂bᵀ x, ∂D = ∂yᵀ m

Kept for backward is x alone; there a and b are made once more, chunk by chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.autocast import as_in_product, without_autocast
from longspan.dtypes import accumulation_dtype
from longspan.first_order import first_order
from longspan.ops.chunked.sums import add_product, chunks_of
from longspan.tracing import OpaqueOperator, has_no_values, unseen_by_checkpointing


def chunked_swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, chunk_size: int) -> Tensor:
    """``F.linear(silu(F.linear(x, gate)) ⊙ F.linear(x, up), down)`` of `chunk_size` tokens at a time, forward and backward.

    Args:
        x: ``[..., C]``, of any floating dtype. Under torch.autocast all are cast as the inputs of a matrix product are.
        gate, up: ``[F, C]``, the dtype of x. Their gradients are summed over chunks in float32 at least.
        down: ``[C', F]``, likewise.
        chunk_size: tokens.

    Returns:
        ``[..., C']``, in the dtype of products. It has no second derivative.

    Source: the Mini-Sequence Transformer (arXiv 2407.15892); SwiGLU: arXiv 2002.05202.
    """
    dtype = as_in_product(x.new_empty(0)).dtype
    out: Tensor = (OPERATOR if has_no_values(x) else _apply)(x, gate, up, down, chunk_size, dtype)
    return out


class ChunkedSwiGLU(torch.autograd.Function):
    """See the module for the equations.

    | | shape | gradient |
    |---|---|---|
    | x | ``[..., C]`` | ∂x |
    | gate, up | ``[F, C]`` | ∂G, ∂U |
    | down | ``[C', F]`` | ∂D |
    | result | ``[..., C']`` | |
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, chunk_size: int, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(x, gate, up, down)
        ctx.options = chunk_size, dtype
        return _forward(x, gate, up, down, chunk_size, dtype)[0]

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found = _backward(grad, ctx.needs_input_grad[:4], *ctx.saved_tensors, *ctx.options)
        return (*found, None, None)


_apply = unseen_by_checkpointing(ChunkedSwiGLU.apply)


def _forward(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, chunk_size: int, dtype: torch.dtype) -> tuple[Tensor]:
    tokens = x.reshape(-1, x.shape[-1])
    gate, up, down = gate.to(dtype), up.to(dtype), down.to(dtype)
    out = tokens.new_empty(len(tokens), len(down), dtype=dtype)
    with without_autocast(x):
        for rows in chunks_of(len(tokens), chunk_size):
            part = tokens[rows].to(dtype)
            out[rows] = F.linear(F.silu(F.linear(part, gate)) * F.linear(part, up), down)
    return (out.view(*x.shape[:-1], len(down)),)


def _backward(
    grad: Tensor,
    needs: tuple[bool, ...],
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    chunk_size: int,
    dtype: torch.dtype,
) -> list[Tensor | None]:
    """The gradients of x, gate, up and down; None for those that are not needed."""
    tokens, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    weights = [weight.to(dtype) for weight in (gate, up, down)]
    grad_x = tokens.new_empty(tokens.shape if needs[0] else 0)
    totals = [
        torch.zeros_like(weight, dtype=accumulation_dtype(dtype)) if needed else None
        for weight, needed in zip(weights, needs[1:], strict=True)
    ]
    with without_autocast(x):
        for rows in chunks_of(len(tokens), chunk_size):
            part, grad_y = tokens[rows].to(dtype), grads[rows]
            a, b = F.linear(part, weights[0]), F.linear(part, weights[1])
            activated, grad_m = F.silu(a), grad_y @ weights[2]
            grad_a = torch.ops.aten.silu_backward(grad_m * b, a)
            grad_b = grad_m * activated
            if needs[0]:
                grad_x[rows] = grad_a @ weights[0] + grad_b @ weights[1]
            factors = ((grad_a, part), (grad_b, part), (grad_y, activated * b))
            for total, (left, right) in zip(totals, factors, strict=True):
                if total is not None:
                    add_product(total, left, right)
    sums = [
        None if total is None else total.to(weight.dtype)
        for total, weight in zip(totals, (gate, up, down), strict=True)
    ]
    return [grad_x.view(x.shape) if needs[0] else None, *sums]


def _without_values(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, chunk_size: int, dtype: torch.dtype
) -> tuple[Tensor]:
    return (x.new_empty(*x.shape[:-1], down.shape[0], dtype=dtype),)


def _gradient(gradients: list[Tensor], outputs: list[Tensor], *arguments: Any) -> list[Tensor | None]:
    return _backward(gradients[0], (True,) * 4, *arguments)


OPERATOR = OpaqueOperator(
    "longspan::chunked_swiglu",
    "Tensor x, Tensor gate, Tensor up, Tensor down, int chunk_size, ScalarType dtype",
    1,
    _forward,
    _without_values,
    _gradient,
)
