"""Softmax attention on one device as one operator of PyTorch, for calls without values: see `longspan.tracing`.

Shapes: as in `longspan.attention.softmax.pair`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longspan.attention.opaque import layout_of
from longspan.attention.softmax.pair import Local
from longspan.layout.visibility import visibility_of
from longspan.tracing import OpaqueOperator


def with_positive_scale(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """Queries and a scale above 0 with the same scores: kernels mask scores with −inf before they scale them.

    Zero: every visible key counts alike, whatever its score.
    """
    if scale > 0:
        return q, scale
    return (-q, -scale) if scale < 0 else (q * 0.0, 1.0)


def _local(k: Tensor, bounds: Tensor | None, causal: bool, window: int | None) -> Local:
    layout = layout_of(k, bounds)
    return Local(layout, visibility_of(layout, causal, window))


def _attend(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None, causal: bool, window: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    """o, and the log-sum-exp that backward needs."""
    q, scale = with_positive_scale(q, scale)
    o, (*_, lse) = _local(k, bounds, causal, window).attend(q, k, v, scale)
    return o, lse


def _attend_fake(q: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    rows, num_tokens, heads, _ = q.shape
    lse = q.new_empty(rows, heads, num_tokens, dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(q.shape), lse


def _gradient(
    gradients: Sequence[Tensor],
    outputs: Sequence[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Tensor | None, ...]:
    local = _local(k, bounds, causal, window)
    signed, positive = with_positive_scale(q, scale)
    dq, key_grads = local.backward(gradients[0], (signed, k, v, *outputs), positive, 0, False)
    assert key_grads is not None
    dk, dv = (x.to(q.dtype) for x in key_grads)
    return dq if scale > 0 else dq * (scale / positive), dk, dv, None


SOFTMAX = OpaqueOperator(
    "longspan::softmax",
    "Tensor q, Tensor k, Tensor v, Tensor? bounds, bool causal, int? window, float scale",
    2,
    _attend,
    _attend_fake,
    _gradient,
)
