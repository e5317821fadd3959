"""What the phases of one call of the delta rule share: its tiling, factors and blocks of tokens laid out by chunks.

Shapes: as in `longspan.ops.delta` and `longspan.ops.matrices`; tensors of a call are ``[N, B, H, C, ·]``. Where a token writes
several times, C counts rows, of which a token has `DeltaCall.num_steps`, one after another, and its query reads after the last.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.layout import SequenceLayout
from longspan.ops.decay.factors import BlockFactors, Factors, WideScores
from longspan.ops.decay.gate_gradient import GateGradient
from longspan.ops.finite import finite_part, from_then_on, until_then
from longspan.ops.matrices import Factor, batched_product, flat, put_scaled, scaled, times, with_scale
from longspan.ops.tiling import ChunkBlock, Tiling


@dataclass(frozen=True)
class DeltaCall:
    """What the phases of one call share beside tensors.

    tiling: of rows, which write. of_tokens: of tokens, which read: the same chunks; the same object where a token has one row.
    """

    layout: SequenceLayout
    tiling: Tiling
    factors: Factors
    num_heads: int
    dtype: torch.dtype
    """Of everything inside: the dtype of the states."""
    of_tokens: Tiling
    num_steps: int = 1

    @property
    def blocks(self) -> Iterator[tuple[ChunkBlock, ChunkBlock]]:
        """The blocks of rows, each with the same chunks as a block of tokens."""
        return zip(self.tiling.blocks, self.of_tokens.blocks, strict=True)

    def last_rows(self, x: Tensor) -> Tensor:
        """Of rows ``x [n, B, H, c, D]`` those after which tokens read, a view."""
        return x if self.num_steps == 1 else x[:, :, :, self.num_steps - 1 :: self.num_steps]

    def allocate(self, like: Tensor, rows: int, columns: int) -> Tensor:
        """A tensor ``[N, B, H, rows, columns]`` for `like [B, T, ...]`; zero where chunks are padded, else not set."""
        make = torch.empty if self.tiling.padding is None else torch.zeros
        shape = (self.tiling.num_chunks, like.shape[0], self.num_heads, rows, columns)
        return make(shape, dtype=self.dtype, device=like.device)

    def totals(self, batch: int) -> tuple[Tensor, ...] | None:
        """For each chunk e^{b_C}, ``[B·H, D, 1]``; None is 1."""
        totals = self.factors.totals
        if totals is None:
            return None
        return tuple(total.expand(batch, -1, -1, -1).flatten(0, 1) for total in totals)


def _row(x: Tensor | None) -> Tensor | None:
    """A factor of states ``[n, B, H, D, 1]`` as one of the columns of q and k, ``[n, B, H, 1, D]``, a view."""
    return None if x is None else x.mT


def causal_part(x: Tensor, num_steps: int) -> Tensor:
    """What tokens read of rows, ``x [n, B, H, c, c · num_steps]``, with zeros for the rows of later tokens; in place."""
    if num_steps == 1:
        return x.tril_()
    num_tokens, num_rows = x.shape[-2:]
    row = torch.arange(num_rows, device=x.device) // num_steps
    return x.masked_fill_(row > torch.arange(num_tokens, device=x.device)[:, None], 0.0)


def take_out_own(x: Tensor, num_steps: int) -> tuple[Tensor, ...]:
    """Zero what tokens read of their own rows, in place, and return it: for each row of a token ``[n, B, H, c, 1]``.

    x: ``[n, B, H, c, c · num_steps]``.
    """
    own = []
    for step in range(num_steps):
        diagonal = x[..., step::num_steps].diagonal(dim1=-2, dim2=-1)
        own.append(diagonal.unsqueeze(-1).clone())
        diagonal.zero_()
    return tuple(own)


def of_any_row(mask: Tensor, num_tokens: int) -> Tensor:
    """Which of `num_tokens` tokens has a marked row, ``[n, B, H, num_tokens, D]``; mask: of rows ``[n, B, H, c, D]``."""
    return mask if mask.shape[3] == num_tokens else mask.unflatten(3, (num_tokens, -1)).any(4)


def of_every_row(mask: Tensor, num_rows: int) -> Tensor:
    """A mask of tokens as one of their rows, ``[n, B, H, num_rows, D]``."""
    return mask if mask.shape[3] == num_rows else mask.repeat_interleave(num_rows // mask.shape[3], 3)


def causal_product(lower: Tensor, rows: Tensor, finite: bool) -> Tensor:
    """The products of lower triangular ``[n, B, H, c, c]`` and rows of tokens ``[n, B, H, c, D]``.

    No later token reaches an earlier one. finite: nothing in the rows is NaN or infinite. `lower` may be of tokens and their rows,
    as `causal_part` makes it.
    """
    if finite:
        return batched_product(lower, rows)
    reached = from_then_on(of_any_row(~rows.isfinite(), lower.shape[-2]))
    return batched_product(lower, finite_part(rows)).masked_fill_(reached, torch.nan)


def anticausal_product(lower: Tensor, rows: Tensor, finite: bool) -> Tensor:
    """As `causal_product`, with the transposed matrix: no earlier token reaches a later one."""
    if finite:
        return batched_product(lower.mT, rows)
    reached = of_every_row(until_then(~rows.isfinite()), lower.shape[-1])
    return batched_product(lower.mT, finite_part(rows)).masked_fill_(reached, torch.nan)


def block_rows(x: Tensor, block: ChunkBlock, columns: int | None = None) -> Tensor:
    """The block's rows of ``x [N, B, H, C, D]`` (and the first `columns` of its columns): a view, or a copy of gathered chunks."""
    taken = x[block.chunks, :, :, : block.chunk_size]
    return taken if columns is None else taken[..., :columns]


def put_rows(target: Tensor, block: ChunkBlock, values: Tensor) -> None:
    """Write ``values [n, B, H, c, D]`` to the block's rows of ``target [N, B, H, C, D or more]``."""
    target[block.chunks, :, :, : block.chunk_size, : values.shape[-1]] = values.to(target.dtype)


def put_product(target: Tensor, block: ChunkBlock, first: Tensor, second: Tensor) -> None:
    """Write the matrix products of ``first`` and ``second`` to the block's rows of ``target [N, B, H, C, D]``."""
    if isinstance(block.chunks, slice):
        out = target[block.chunks, :, :, : block.chunk_size]
        torch.bmm(flat(first), flat(second), out=out.view(-1, *out.shape[-2:]))
    else:
        put_rows(target, block, batched_product(first, second))


def poison_rows(target: Tensor, block: ChunkBlock, mask: Tensor) -> None:
    """Set the block's rows of ``target [N, B, H, C, D]`` to NaN where ``mask [n, B, H, c, D or 1]`` holds."""
    put_rows(target, block, block_rows(target, block).masked_fill(mask, torch.nan))


def take_block(call: DeltaCall, block: ChunkBlock, x: Tensor) -> Tensor:
    """The block's tokens of ``x [B, T, H or H_k, D]`` as ``[n, B, H, c, D]`` in the call's dtype, heads repeated; may be a view.

    Padding is zero.
    """
    # Padding repeats a token that may be NaN, which a product with zero would keep.
    taken = block.without_padding(block.take(x))
    if taken.dtype != call.dtype:
        taken = taken.to(call.dtype, memory_format=torch.contiguous_format)
    return taken if taken.shape[2] == call.num_heads else scaled(taken, None, call.num_heads)


@dataclass(frozen=True)
class Keys:
    """Of one block: factors, k as it came, k̂ and k̃, ``[n, B, H, c, K]``.

    query, key: e^{b−m}, e^{m−b}. enter, leave: e^m and e^{b_C−m} as rows, ``[n, B or 1, H, 1, D]``. None is 1.
    """

    query: Tensor | None
    key: Tensor | None
    enter: Tensor | None
    leave: Tensor | None
    plain: Tensor
    ahead: Tensor
    behind: Tensor

    @property
    def leaving(self) -> Tensor:
        """What each token adds to the state that leaves its chunk, for a unit update: e^{b_C−m} k̃."""
        return times(self.behind, self.leave)


def block_factors(call: DeltaCall, block: ChunkBlock, g: Tensor | None, decays: Tensor | None) -> BlockFactors:
    """The factors of a block, from `decays`, what the write phase kept of them; None: formed again."""
    if decays is None:
        return call.factors.block(block, g)
    return call.factors.restore(block, g, block_rows(decays, block))


def block_keys(call: DeltaCall, block: ChunkBlock, k: Tensor, g: Tensor | None, decays: Tensor | None) -> Keys:
    """The keys of a block."""
    factors = block_factors(call, block, g, decays)
    plain = take_block(call, block, k)
    behind = scaled(plain, factors.key, call.num_heads)
    # Without a decay the two are one tensor, and without padding all three.
    ahead = behind if factors.query is factors.key else scaled(plain, factors.query, call.num_heads)
    return Keys(
        factors.query,
        factors.key,
        _row(factors.enter),
        _row(factors.leave),
        behind if factors.key is None else plain,
        ahead,
        behind,
    )


def leaving_keys(call: DeltaCall, block: ChunkBlock, k: Tensor, g: Tensor | None, decays: Tensor | None) -> Tensor:
    """`Keys.leaving` of a block, alone."""
    factors = block_factors(call, block, g, decays)
    return times(scaled(take_block(call, block, k), factors.key, call.num_heads), _row(factors.leave))


def _query_factor(call: DeltaCall, block: ChunkBlock, g: Tensor | None, decays: Tensor | None) -> Tensor | None:
    """e^{b−m} of a block's tokens, ``[n, B or 1, H, c, D]``, from `decays`, what the write phase kept of it; None: formed again."""
    factor = call.factors.query(block, g) if decays is None else block_rows(decays, block)
    return None if factor is None else call.last_rows(factor)


@dataclass(frozen=True)
class QueryBlock:
    """Of one block: e^{b−m}, scale · q and q̂, ``[n, B, H, c, K]``."""

    query: Tensor | None
    plain: Tensor
    ahead: Tensor


def block_queries(
    call: DeltaCall,
    block: ChunkBlock,
    tokens: ChunkBlock,
    q: Tensor,
    scale: float,
    g: Tensor | None,
    decays: Tensor | None,
) -> QueryBlock:
    """The queries of a block for the keys of their chunk; tokens: the block of the same chunks' tokens."""
    query = _query_factor(call, block, g, decays)
    plain = take_block(call, tokens, q) * scale
    return QueryBlock(query, plain, scaled(plain, query, call.num_heads))


def state_factor(call: DeltaCall, block: ChunkBlock, scale: float, g: Tensor | None, decays: Tensor | None) -> Factor:
    """What turns a block's q into queries for the state before their chunk: scale · e^b, ``[n, B or 1, H, c, D]``."""
    query = _query_factor(call, block, g, decays)
    enter = _row(call.factors.enter(block))
    if query is None:
        return with_scale(None, scale)
    return query * scale if enter is None else query * (enter * scale)


def scores(
    call: DeltaCall, block: ChunkBlock, g: Tensor | None, rows: Tensor, columns: Tensor, ahead: Tensor, behind: Tensor
) -> tuple[Tensor, WideScores | None]:
    """Decayed products of rows (queries or keys) with keys, ``[n, B, H, c, c]``; what a wide block needs for its backward.

    rows, columns: without factors, for wide blocks; ahead, behind: with them. The rows may be tokens, and the columns their rows.
    """
    if not call.factors.is_wide(block):
        return batched_product(ahead, behind.mT), None
    if rows.shape[3] == columns.shape[3]:
        return call.factors.wide_scores(block, g, rows.contiguous(), columns.contiguous())
    spread = torch.zeros_like(columns, memory_format=torch.contiguous_format)
    call.last_rows(spread).copy_(rows)
    found, wide = call.factors.wide_scores(block, g, spread, columns.contiguous())
    return call.last_rows(found), _WideScoresOfTokens(call, wide)


@dataclass(frozen=True)
class _WideScoresOfTokens(WideScores):
    """Those of the rows after which tokens read."""

    call: DeltaCall
    of_rows: WideScores

    def backward(self, grad_scores: Tensor) -> tuple[Tensor, Tensor]:
        grad = grad_scores.new_zeros(*grad_scores.shape[:3], grad_scores.shape[-1], grad_scores.shape[-1])
        self.call.last_rows(grad).copy_(grad_scores)
        grad_rows, grad_columns = self.of_rows.backward(grad)
        return self.call.last_rows(grad_rows), grad_columns


class TokenSums:
    """Collects Σ x ⊙ ∂x of tokens, which `GateGradient` turns into ∂g, and hands it on as the gradient of a ticket.

    A ticket is a tensor of the shape of g, in the call's dtype, that carries no value: `longspan.ops.delta.write` hands it out,
    and what the later phases find for it is added up on its way back.
    """

    def __init__(self, call: DeltaCall, ticket: Tensor | None, total: Tensor | None) -> None:
        """ticket: None where no gradient is wanted; total: what later phases found, to which this one adds."""
        self._num_steps = call.num_steps
        self._per_channel = ticket is not None and ticket.dim() == 4
        self.total = total
        if ticket is not None and total is None:
            self.total = torch.zeros(ticket.shape, dtype=call.dtype, device=ticket.device)

    def add(
        self,
        block: ChunkBlock,
        tokens: ChunkBlock,
        x: Tensor,
        grad: Tensor,
        subtracted: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Add ``x ⊙ ∂x`` of tokens, ``[n, B, H, c, K]``, and take off that of `subtracted`; summed over K for a decay per head.

        What tokens add counts for the last of their rows; `subtracted` is of rows.
        """
        if self.total is None:
            return
        step = self._num_steps
        if step > 1:
            self._put(self.total[:, step - 1 :: step], tokens, self._sums(x, grad))
            if subtracted is not None:
                self._put(self.total, block, self._sums(*subtracted).neg_())
        elif subtracted is None:
            self._put(self.total, tokens, self._sums(x, grad))
        elif self._per_channel:
            self._put(self.total, tokens, (x * grad).addcmul_(*subtracted, value=-1))
        else:
            self._put(self.total, tokens, self._sums(x, grad).sub_(self._sums(*subtracted)))

    def _sums(self, x: Tensor, grad: Tensor) -> Tensor:
        return x * grad if self._per_channel else torch.linalg.vecdot(x, grad).unsqueeze(-1)

    def _put(self, total: Tensor, block: ChunkBlock, sums: Tensor) -> None:
        put_scaled(total if self._per_channel else total.unsqueeze(-1), block, sums, add=True)


def ticket_like(call: DeltaCall, g: Tensor | None, wanted: bool) -> Tensor | None:
    """A ticket for the gradient of g, or None where none is wanted."""
    if g is None or not wanted:
        return None
    return torch.zeros((), dtype=call.dtype, device=g.device).expand(g.shape)


def gate_gradient(call: DeltaCall, g: Tensor | None, wanted: bool) -> GateGradient | None:
    """What collects ∂g, or None where none is wanted."""
    return GateGradient(call.tiling, g, call.dtype) if g is not None and wanted else None
