"""Runs blocks: their outputs merged by log-sum-exp, their gradients summed.

Shapes: B batch, T queries of this rank, L keys in a buffer, H heads, H_kv key and value heads, D head dimension, D_v of
values.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from longspan.dtypes import accumulation_dtype, at_least_float32
from longspan.layout.visibility import VisibleBlock
from longspan.ops.softmax.block import block_backward, block_forward, finite_lse


class Merged:
    """Outputs and log-sum-exp of a rank's queries, as blocks of keys come in.

    Where several blocks are merged, outputs gather in float32 (float64 for float64).
    """

    def __init__(self, q: Tensor, scale: float, softcap: float | None) -> None:
        """scale, softcap: of all blocks' scores, as in `block_forward`."""
        self._q, self._scale, self._softcap = q, scale, softcap
        self._out: Tensor | None = None
        self._lse: Tensor | None = None

    @property
    def num_heads(self) -> int:
        """Number of query heads H."""
        return self._q.shape[2]

    @property
    def out(self) -> Tensor:
        """[B, T, H, D_v] in q's dtype."""
        assert self._out is not None
        return self._out.to(self._q.dtype)

    @property
    def lse(self) -> Tensor:
        """[B, H, T], finite: what `block_backward` takes."""
        assert self._lse is not None
        return finite_lse(self._lse)

    def add(self, blocks: Iterable[VisibleBlock], k: Tensor, v: Tensor) -> None:
        """Let the queries attend to the keys [B, L, H_kv, D] and values [B, L, H_kv, D_v] of `blocks`, too."""
        for block in blocks:
            q = query_tile(self._q, block)
            out, lse = block_forward(
                q, *key_tiles(block, k, v), causal=block.mask != "full", scale=self._scale, softcap=self._softcap
            )
            if block.mask == "anticausal":
                out, lse = out.flip(1), lse.flip(2)
            self._merge(block, out, lse)

    def others(self, q: Tensor) -> Merged:
        """The same for queries of another rank [B, n, H, D]."""
        return Merged(q, self._scale, self._softcap)

    def add_found(self, out: Tensor, lse: Tensor) -> None:
        """Let the first n queries see what they saw elsewhere, too: its out [B, n, H, D_v] and lse [B, H, n]."""
        self._merge(VisibleBlock(0, out.shape[1], 0, 0, "full"), out, lse)

    @property
    def found(self) -> tuple[Tensor, Tensor]:
        """What `add_found` takes: [B, T, H, D_v] in q's dtype, and [B, H, T], -inf where a query saw no score above that."""
        assert self._lse is not None
        return self.out, self._lse

    def add_sinks(self, sinks: Tensor) -> None:
        """Let every query see one more key, whose score is sinks [H] of its head and whose value is 0."""
        assert self._out is not None and self._lse is not None
        scores = sinks.to(self._lse.dtype).unsqueeze(-1)
        # The keys' share of the sum of exponentials; none where neither they nor the sink have any.
        share = (self._lse - scores).sigmoid().nan_to_num(nan=0.0)
        self._out = self._out * share.transpose(1, 2).unsqueeze(-1)
        self._lse = torch.logaddexp(self._lse, scores)

    def _merge(self, block: VisibleBlock, out: Tensor, lse: Tensor) -> None:
        if self._out is None or self._lse is None:
            if block.opens and block.count == 1 and block.num_queries == self._q.shape[1]:
                # All queries, for the first time: nothing to copy.
                self._out, self._lse = out, lse
                return
            self._allocate(out.shape[3], empty=block.opens)
        elif self._out.dtype != accumulation_dtype(self._q.dtype):
            self._out = self._out.float()
        assert self._out is not None and self._lse is not None
        start, size = block.query_start, block.num_queries
        all_out = _strided(self._out, 1, start, size, block)
        all_lse = _strided(self._lse, 2, start, size, block)
        rows = self._q.shape[0]
        out, lse = out.unflatten(0, (rows, block.count)), lse.unflatten(0, (rows, block.count)).transpose(1, 2)
        if block.opens:
            all_out.copy_(out)
            all_lse.copy_(lse)
            return
        # The newcomer's share of the sum of exponentials; none where neither has any.
        share = (lse - all_lse).sigmoid_().nan_to_num_(nan=0.0).permute(0, 2, 3, 1).unsqueeze(-1)
        all_out.lerp_(out.to(all_out.dtype), share)
        all_lse.copy_(torch.logaddexp(all_lse, lse))

    def _allocate(self, value_dim: int, empty: bool) -> None:
        rows, num_queries, heads, _ = self._q.shape
        dtype = accumulation_dtype(self._q.dtype)
        self._out = self._q.new_empty((rows, num_queries, heads, value_dim), dtype=dtype)
        self._lse = self._q.new_empty((rows, heads, num_queries), dtype=dtype)
        if not empty:
            self._out.zero_()
            self._lse.fill_(float("-inf"))


class Total:
    """A sum of blocks' gradients [B, tokens, heads, D], in float32 (float64 for float64) where there is more than one."""

    def __init__(self, shape: torch.Size, like: Tensor) -> None:
        self._shape, self._like = shape, like
        self._sum: Tensor | None = None

    def add(self, start: int, size: int, block: VisibleBlock, grad: Tensor) -> None:
        """Add grad [B · count, size, heads, D] to the tokens from `start` on, and its repetitions."""
        if self._sum is None:
            if block.count == 1 and size == self._shape[1]:
                self._sum = grad
                return
            self._sum = self._like.new_zeros(self._shape, dtype=accumulation_dtype(self._like.dtype))
        elif self._sum.dtype != accumulation_dtype(self._sum.dtype):
            self._sum = self._sum.float()
        grad = grad.unflatten(0, (self._shape[0], block.count))
        if block.count > 1 and size > block.period:
            # The repetitions share tokens.
            for index in range(block.count):
                first = start + index * block.period
                self._sum[:, first : first + size] += grad[:, index]
            return
        tile = _strided(self._sum, 1, start, size, block)
        tile += grad

    @property
    def sum(self) -> Tensor:
        """[B, tokens, heads, D]: of no block, zeros."""
        if self._sum is None:
            self._sum = self._like.new_zeros(self._shape)
        return self._sum


class QueryTile:
    """What backward knows of a rank's queries, and the sum of their gradients.

    q [B, T, H, D]; out, grad_out [B, T, H, D_v]; out and lse [B, H, T] merged over all blocks of all keys, and sinks.
    """

    def __init__(
        self, q: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor, scale: float, softcap: float | None
    ) -> None:
        self._q, self._out, self._lse, self._grad_out = q, out, lse, grad_out
        self._scale, self._softcap = scale, softcap
        self._dq = Total(q.shape, q)

    @property
    def num_heads(self) -> int:
        """Number of query heads H."""
        return self._q.shape[2]

    @property
    def dq(self) -> Tensor:
        """The gradient of all queries that `backward` has gathered so far, [B, T, H, D] in q's dtype."""
        return self._dq.sum.to(self._q.dtype)

    @property
    def summed_dq(self) -> Tensor:
        """`dq`, in float32 or float64 where several blocks have summed."""
        return self._dq.sum

    def add_dq(self, dq: Tensor) -> None:
        """Add the gradient [B, n, H, D] that the first n queries were given elsewhere."""
        self._dq.add(0, dq.shape[1], VisibleBlock(0, dq.shape[1], 0, 0, "full"), dq)

    def others(self, q: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor) -> QueryTile:
        """The same for queries of another rank, n of them."""
        return QueryTile(q, out, lse, grad_out, self._scale, self._softcap)

    def first(self, num_queries: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What another `QueryTile` needs of the first queries: q, out, lse, grad_out."""
        q, out, grad_out = (x[:, :num_queries] for x in (self._q, self._out, self._grad_out))
        return q, out, self._lse[:, :, :num_queries], grad_out

    def backward(self, blocks: Iterable[VisibleBlock], k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of `blocks`: dk and dv in the shapes of k and v, in float32 or float64 where several blocks have summed."""
        dk, dv = Total(k.shape, k), Total(v.shape, v)
        for block in blocks:
            flips = block.mask == "anticausal"
            lse = _strided(self._lse, 2, block.query_start, block.num_queries, block).transpose(1, 2).flatten(0, 1)
            grads = block_backward(
                query_tile(self._grad_out, block),
                query_tile(self._q, block),
                *key_tiles(block, k, v),
                query_tile(self._out, block),
                lse.flip(2) if flips else lse,
                causal=block.mask != "full",
                scale=self._scale,
                softcap=self._softcap,
            )
            block_dq, block_dk, block_dv = (x.flip(1) for x in grads) if flips else grads
            self._dq.add(block.query_start, block.num_queries, block, block_dq)
            dk.add(block.key_start, block.num_keys, block, block_dk)
            dv.add(block.key_start, block.num_keys, block, block_dv)
        return dk.sum, dv.sum

    def sink_grads(self, sinks: Tensor) -> Tensor:
        """The gradient of the sinks [H], as these queries see them: −Σ e^(sink − lse) · (∂o·o), since a sink's value is 0."""
        probabilities = (sinks.to(self._lse.dtype).unsqueeze(-1) - self._lse).exp()
        delta = (at_least_float32(self._grad_out) * self._out).sum(-1).transpose(1, 2)
        return -(probabilities * delta).sum((0, 2)).to(sinks.dtype)


def query_tile(x: Tensor, block: VisibleBlock) -> Tensor:
    """The block's queries of x [B, T, H, ·], as [B · count, num_queries, H, ·]; from the last to the first if anticausal."""
    return _tile_of_block(x, block.query_start, block.num_queries, block)


def key_tiles(block: VisibleBlock, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The block's keys and values of [B, L, H_kv, ·], as [B · count, num_keys, H_kv, ·]."""
    start, size = block.key_start, block.num_keys
    return _tile_of_block(k, start, size, block), _tile_of_block(v, start, size, block)


def _tile_of_block(x: Tensor, start: int, size: int, block: VisibleBlock) -> Tensor:
    tile = _strided(x, 1, start, size, block).flatten(0, 1)
    # A square in which query i sees key i and later ones is, read backwards, one in which it sees earlier ones.
    return tile.flip(1) if block.mask == "anticausal" else tile


def _strided(x: Tensor, dim: int, start: int, size: int, block: VisibleBlock) -> Tensor:
    """A view of the tokens of a block: dimension `dim` of x, of tokens, as two, [count, size]."""
    if block.count == 1:
        return x.narrow(dim, start, size).unsqueeze(dim)
    span = (block.count - 1) * block.period + size
    return x.narrow(dim, start, span).unfold(dim, size, block.period).movedim(-1, dim + 1)
