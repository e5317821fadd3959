"""Softmax attention on one device as one operator of PyTorch, for calls without values: see `longspan.tracing`.

Shapes: as in `longspan.attention.softmax.pair`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from longspan.attention.opaque import layout_of
from longspan.attention.softmax.pair import Local, Past, attend
from longspan.dtypes import accumulation_dtype
from longspan.layout.visibility import VisibleBlock, visibility_of
from longspan.ops.softmax.merge import QueryTile
from longspan.tracing import OpaqueOperator


def with_positive_scale(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """Queries and a scale above 0 with the same scores: kernels mask scores with −inf before they scale them.

    Zero: every visible key counts alike, whatever its score.
    """
    if scale > 0:
        return q, scale
    return (-q, -scale) if scale < 0 else (q * 0.0, 1.0)


class Given(NamedTuple):
    """What the operator is given."""

    q: Tensor
    k: Tensor
    v: Tensor
    past_k: Tensor | None
    past_v: Tensor | None
    bounds: Tensor | None
    sinks: Tensor | None
    causal: bool
    window: int | None
    scale: float
    softcap: float | None

    def parts(self) -> tuple[Local, tuple[VisibleBlock, ...]]:
        """The exchange of one device, and the blocks on the keys of the past."""
        layout = layout_of(self.k, self.bounds)
        local = Local(layout, visibility_of(layout, self.causal, self.window))
        if self.past_k is None or self.past_v is None:
            return local, ()
        return local, Past.of(self.past_k, self.past_v, layout, self.window).blocks(layout.segments)


def _attend(*arguments: Any) -> tuple[Tensor, Tensor]:
    """o, and the log-sum-exp that backward needs."""
    given = Given(*arguments)
    q, scale = with_positive_scale(given.q, given.scale)
    local, past_blocks = given.parts()
    past = given.past_k, given.past_v
    found = attend(local, q, given.k, given.v, past, past_blocks, given.sinks, scale, given.softcap)
    return found.out, found.lse


def _attend_fake(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    rows, num_tokens, heads, _ = q.shape
    lse = q.new_empty(rows, heads, num_tokens, dtype=accumulation_dtype(q.dtype))
    return q.new_empty(rows, num_tokens, heads, v.shape[3]), lse


def _gradient(gradients: Sequence[Tensor], outputs: Sequence[Tensor], *arguments: Any) -> tuple[Tensor | None, ...]:
    given = Given(*arguments)
    q, scale, sinks = given.q, given.scale, given.sinks
    local, past_blocks = given.parts()
    signed, positive = with_positive_scale(q, scale)
    queries = QueryTile(signed, outputs[0], outputs[1], gradients[0], positive, given.softcap)
    key_grads = local.backward(queries, (given.k, given.v), 0, False)
    past_grads = None
    if given.past_k is not None and given.past_v is not None:
        past_grads = queries.backward(past_blocks, given.past_k, given.past_v)
    found = [x.to(q.dtype) for grads in (key_grads, past_grads) if grads is not None for x in grads]
    dq = queries.dq if scale > 0 else queries.dq * (scale / positive)
    sink_grads = None if sinks is None else queries.sink_grads(sinks)
    return dq, *found, *[None] * (5 - len(found)), sink_grads


SOFTMAX = OpaqueOperator(
    "longspan::softmax",
    "Tensor q, Tensor k, Tensor v, Tensor? past_k, Tensor? past_v, Tensor? bounds, Tensor? sinks, bool causal, int? window, "
    "float scale, float? softcap",
    2,
    _attend,
    _attend_fake,
    _gradient,
)
