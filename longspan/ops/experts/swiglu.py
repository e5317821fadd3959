"""SwiGLU by the experts that each token has chosen: `expert_swiglu`.

Shapes: N tokens, C channels, E experts of width F, k experts of a token, M = N · k rows: a token with one of its experts e.

    a = x Gₑᵀ, b = x Uₑᵀ, m = silu(a) ⊙ b, y = (w m) Dₑᵀ           output of a token: the sum of its k rows y
    ∂(w m) = ∂y Dₑ, ∂w = ⟨∂(w m), m⟩, ∂m = w ∂(w m), ∂b = ∂m ⊙ silu(a), ∂a = ∂m ⊙ b ⊙ silu'(a)
    ∂x = the sum over a token's rows of ∂a Gₑ + ∂b Uₑ,   ∂Gₑ = ∂aᵀ x, ∂Uₑ = ∂bᵀ x, ∂Dₑ = ∂yᵀ (w m), over the rows of e

The weight w stands before the last product, so that its gradient needs no y. Kept for backward are a and b, in the order of the
rows, and with chunks of tokens neither.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.autocast import as_in_product, without_autocast
from longspan.dtypes import accumulation_dtype, at_least_float32
from longspan.first_order import first_order
from longspan.ops.chunked.sums import chunks_of
from longspan.ops.experts.dispatch import Dispatch
from longspan.ops.experts.grouped import Groups, takes_one_kernel
from longspan.tracing import OpaqueOperator, has_no_values, unseen_by_checkpointing


def expert_swiglu(
    x: Tensor, chosen: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor, chunk_size: int = 0
) -> Tensor:
    """``Σ_j weights[:, j] · swiglu of expert chosen[:, j]``, of every token; none is dropped, however many an expert has.

    Args:
        x: ``[N, C]``, of any floating dtype. Under torch.autocast x and the matrices are cast as a matrix product's inputs are.
        chosen: int64 ``[N, k]``, from 0 to E - 1; the k of a token differ.
        weights: ``[N, k]``, float32 (float64 for float64).
        gate, up: ``[E, F, C]``, the dtype of x.
        down: ``[E, C', F]``, likewise.
        chunk_size: tokens computed at a time, and once more in backward, so that nothing of width F is kept (arXiv 2407.15892); 0
            computes all at once.

    Returns:
        ``[N, C']``, in the dtype of products. It has no second derivative. A token's rows are summed in float32 at least, and so
        are the gradients of matrices over chunks. An expert without a token has gradients of zero.

    On a GPU the host waits for the number of tokens of each expert, once in forward (with chunks once for each, in backward as
    well); not where `grouped_mm` has a kernel.

    Source: SwiGLU: arXiv 2002.05202; dropless experts: arXiv 2211.15841.
    """
    dtype = as_in_product(x.new_empty(0)).dtype
    out: Tensor = (OPERATOR if has_no_values(x) else _apply)(x, chosen, weights, gate, up, down, chunk_size, dtype)
    return out


class Given(NamedTuple):
    """What `expert_swiglu` was given, and the dtype of products."""

    x: Tensor
    chosen: Tensor
    weights: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor
    chunk_size: int
    dtype: torch.dtype

    @property
    def matrices(self) -> list[Tensor]:
        """gate, up and down, in the dtype of products."""
        return [matrix.to(self.dtype) for matrix in (self.gate, self.up, self.down)]


class ExpertSwiGLU(torch.autograd.Function):
    """See the module for the equations; the arguments are those of `Given`.

    | | shape | gradient |
    |---|---|---|
    | x | ``[N, C]`` | ∂x |
    | chosen | ``[N, k]`` | none |
    | weights | ``[N, k]`` | ∂w |
    | gate, up | ``[E, F, C]`` | ∂G, ∂U |
    | down | ``[E, C', F]`` | ∂D |
    | result | ``[N, C']`` | |
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        given = Given(*arguments)
        x, chosen, weights, gate, up, down, *ctx.options = given
        if given.chunk_size:
            ctx.save_for_backward(x, weights, gate, up, down, chosen)
            return _forward_in_chunks(given, given.chunk_size)
        matrices = given.matrices
        with without_autocast(x):
            narrow = x.to(given.dtype)
            dispatch = _dispatch(narrow, chosen, matrices)
            out, a, b = _forward(narrow, dispatch, weights, matrices)
        ctx.bounds = dispatch.groups.bounds
        kept = dispatch.choice, dispatch.row, dispatch.groups.ends, a, b
        ctx.save_for_backward(x, weights, gate, up, down, *kept)
        return out.to(given.dtype)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, gate, up, down, *kept = ctx.saved_tensors
        chunk_size, dtype = ctx.options
        chosen = before = None
        if chunk_size:
            (chosen,) = kept
        else:
            choice, row, ends, a, b = kept
            before = Dispatch(choice, row, Groups(ends, ctx.bounds)), a, b
        needs = ctx.needs_input_grad
        matrices = [gate, up, down]
        found = _gradients(grad, needs[:1] + needs[2:6], x, chosen, weights, matrices, chunk_size, dtype, before)
        return (found[0], None, *found[1:], None, None)


def _dispatch(x: Tensor, chosen: Tensor, matrices: list[Tensor]) -> Dispatch:
    gate, _, down = matrices
    return Dispatch.of(chosen, len(gate), takes_one_kernel(x, *gate.shape[1:], *down.shape[1:]))


def _inner(x: Tensor, dispatch: Dispatch, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """a and b, ``[M, F]``, and the rows ``[M, C]`` that they are of."""
    rows = dispatch.rows_of_tokens(x)
    return dispatch.groups.times(rows, gate.mT), dispatch.groups.times(rows, up.mT), rows


def _weights_of_rows(dispatch: Dispatch, weights: Tensor) -> Tensor:
    return weights.flatten()[dispatch.choice].unsqueeze(-1)


def _forward(x: Tensor, dispatch: Dispatch, weights: Tensor, matrices: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The output of some tokens, float32 at least, and their a and b."""
    gate, up, down = matrices
    a, b, _ = _inner(x, dispatch, gate, up)
    weighted = (F.silu(a).mul_(b) * _weights_of_rows(dispatch, weights)).to(x.dtype)
    return dispatch.sums_of_tokens(dispatch.groups.times(weighted, down.mT)), a, b


def _forward_in_chunks(given: Given, chunk_size: int) -> Tensor:
    x, matrices = given.x, given.matrices
    out = x.new_empty(len(x), given.down.shape[1], dtype=given.dtype)
    with without_autocast(x):
        for tokens in chunks_of(len(x), chunk_size):
            part = x[tokens].to(given.dtype)
            dispatch = _dispatch(part, given.chosen[tokens], matrices)
            out[tokens] = _forward(part, dispatch, given.weights[tokens], matrices)[0]
    return out


def _gradients(
    grad: Tensor,
    needs: tuple[bool, ...],
    x: Tensor,
    chosen: Tensor | None,
    weights: Tensor,
    given: list[Tensor],
    chunk_size: int,
    dtype: torch.dtype,
    before: tuple[Dispatch, Tensor, Tensor] | None,
) -> list[Tensor | None]:
    """The gradients of x, weights, and the matrices `given`; None for those that are not needed.

    before: the dispatch of all tokens with their a and b, where forward has kept them; else `chosen` is given.
    """
    matrices = [matrix.to(dtype) for matrix in given]
    chunk_size = chunk_size or max(1, len(x))
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    grad_weights = torch.empty_like(weights, memory_format=torch.contiguous_format)
    totals = _Totals(matrices, needs[2:], is_one=chunk_size >= len(x))
    with without_autocast(x):
        for tokens in chunks_of(len(x), chunk_size):
            part = x[tokens].to(dtype)
            if before is not None:
                (dispatch, a, b), rows = before, before[0].rows_of_tokens(part)
            else:
                assert chosen is not None
                dispatch = _dispatch(part, chosen[tokens], matrices)
                a, b, rows = _inner(part, dispatch, matrices[0], matrices[1])
            grad_y = dispatch.rows_of_tokens(grad[tokens].to(dtype))
            activated = F.silu(a)
            inner, w = activated * b, _weights_of_rows(dispatch, weights[tokens])
            totals.add(2, dispatch.groups, grad_y, (inner * w).to(dtype))
            grad_weighted = dispatch.groups.times(grad_y, matrices[2])
            grad_weights[tokens] = (at_least_float32(grad_weighted) * inner).sum(-1)[dispatch.row]
            grad_inner = (grad_weighted * w).to(dtype)
            grad_b = grad_inner * activated
            grad_a = torch.ops.aten.silu_backward(grad_inner.mul_(b), a)
            totals.add(0, dispatch.groups, grad_a, rows)
            totals.add(1, dispatch.groups, grad_b, rows)
            if needs[0]:
                grad_rows = dispatch.groups.times(grad_a, matrices[0]).add_(dispatch.groups.times(grad_b, matrices[1]))
                grad_x[tokens] = dispatch.sums_of_tokens(grad_rows).to(x.dtype)
    of_x, of_weights = (found if needed else None for found, needed in zip((grad_x, grad_weights), needs, strict=False))
    return [of_x, of_weights, *totals.as_their(given)]


class _Totals:
    """Sums over chunks of the gradients of some matrices: of one chunk its own, of several in float32 at least."""

    def __init__(self, matrices: list[Tensor], needs: tuple[bool, ...], is_one: bool) -> None:
        self._needs = needs
        self._sums: list[Tensor | None] = [
            torch.zeros_like(matrix, dtype=accumulation_dtype(matrix.dtype), memory_format=torch.contiguous_format)
            if needed and not is_one
            else None
            for matrix, needed in zip(matrices, needs, strict=True)
        ]

    def add(self, place: int, groups: Groups, left: Tensor, right: Tensor) -> None:
        """Add the product of left and right for each expert to the gradient of the matrix at `place`."""
        if not self._needs[place]:
            return
        total = self._sums[place]
        if total is None:
            self._sums[place] = groups.gram(left, right)
        else:
            groups.add_gram(total, left, right)

    def as_their(self, matrices: list[Tensor]) -> list[Tensor | None]:
        """The sums in the dtypes of the matrices; None where none is needed, zeros where there was no chunk."""
        found: list[Tensor | None] = []
        for matrix, total, needed in zip(matrices, self._sums, self._needs, strict=True):
            whole = torch.zeros_like(matrix) if total is None else total.to(matrix.dtype)
            found.append(whole if needed else None)
        return found


_apply = unseen_by_checkpointing(ExpertSwiGLU.apply)


def _computed(*arguments: Any) -> tuple[Tensor]:
    given = Given(*arguments)
    return (_forward_in_chunks(given, given.chunk_size or max(1, len(given.x))),)


def _without_values(*arguments: Any) -> tuple[Tensor]:
    given = Given(*arguments)
    return (given.x.new_empty(given.x.shape[0], given.down.shape[1], dtype=given.dtype),)


def _gradient(gradients: list[Tensor], outputs: list[Tensor], *arguments: Any) -> list[Tensor | None]:
    x, chosen, weights, *matrices, chunk_size, dtype = Given(*arguments)
    found = _gradients(gradients[0], (True,) * 5, x, chosen, weights, matrices, chunk_size, dtype, None)
    return [found[0], None, *found[1:]]


OPERATOR = OpaqueOperator(
    "longspan::expert_swiglu",
    "Tensor x, Tensor chosen, Tensor weights, Tensor gate, Tensor up, Tensor down, int chunk_size, ScalarType dtype",
    1,
    _computed,
    _without_values,
    _gradient,
)
