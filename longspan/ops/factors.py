"""What the chunk form of a decay needs of its log decays: factors of tokens and of states, block by block.

Shapes: B batch rows, H heads, N chunks, C tokens a chunk, n chunks of a block of c tokens each, K key size. D is 1 where a head has
one decay, K where each key channel has its own. b_t is the sum of g from the chunk's first token to t, itself included.

Scaling q by e^{b_t − m} and k by e^{m − b_s}, with m in the middle of the chunk's range, turns a decay between two tokens into a
product of two numbers. Where the range of b in a chunk is too wide for that (the chunk is *wide*), products inside the chunk are
formed another way, and between chunks q takes e^{b_t} and k takes e^{b_C − b_s}, none of which exceeds 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from longspan.ops.tiling import Block, Tiling

# The widest half-range of b in a chunk for which e^{b − m} and e^{m − b} are formed apart. float32 and bfloat16 reach e^{±87}:
# at 40 a factor keeps 20 decades above the smallest normal number, and an unmasked product overflows at worst to an infinity
# above the diagonal, which the mask overwrites.
MAX_HALF_RANGE = {torch.float64: 300.0, torch.float32: 40.0, torch.bfloat16: 40.0}

# e^{-1e4} is zero in every dtype: a log decay of −inf becomes this, so that no difference of two infinities arises.
LOWEST_LOG_DECAY = -1e4


@dataclass(frozen=True)
class BlockFactors:
    """The factors of one block; None is 1.

    query, key: e^{b − m} and e^{m − b} or their one-sided forms, ``[B or 1, H, n, c, D]`` in the dtype of q; zero at padding.
    enter, leave: e^m (of q's m) and e^{b_C − m} (of k's m), ``[B or 1, H, n, D, 1]`` in the dtype of the states.
    prefix: decay from the start of the piece to the start of the chunk, the same shape.
    """

    query: Tensor | None
    key: Tensor | None
    enter: Tensor | None
    leave: Tensor | None
    prefix: Tensor | None


class Factors(ABC):
    """The factors of a call."""

    @abstractmethod
    def block(self, block: Block, g: Tensor | None) -> BlockFactors:
        """The factors of one block; `g` are the call's log decays, where they differ from token to token."""

    are_large: ClassVar[bool] = False
    """Whether the factors of tokens are as large as q, so that forming them again costs more than keeping them."""

    def restore(self, block: Block, g: Tensor | None, query: Tensor) -> BlockFactors:
        """The factors of one block, given `BlockFactors.query` as `block` made it."""
        return self.block(block, g)

    @abstractmethod
    def query(self, block: Block, g: Tensor | None) -> Tensor | None:
        """`BlockFactors.query` of one block, alone."""

    @abstractmethod
    def enter(self, block: Block) -> Tensor | None:
        """`BlockFactors.enter` of one block, alone."""

    @property
    @abstractmethod
    def totals(self) -> tuple[Tensor, ...] | None:
        """For each chunk e^{b_C}, ``[B or 1, H, D, 1]`` in the dtype of the states; None is 1."""

    @abstractmethod
    def is_wide(self, block: Block) -> bool:
        """Whether any chunk of the block is wide."""

    @abstractmethod
    def wide_scores(self, block: Block, g: Tensor | None, q: Tensor, k: Tensor) -> tuple[Tensor, WideScores]:
        """Scores of a wide block from unscaled q and k ``[B, H, n, c, K]``: ``[B, H, n, c, c]``, zero above the diagonal."""


class WideScores(ABC):
    """What the backward of `Factors.wide_scores` needs."""

    @abstractmethod
    def backward(self, grad_scores: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of q and k, given those of the scores (above the diagonal they are not looked at)."""


class NoDecay(Factors):
    """Nothing decays; only padding is masked."""

    def __init__(self, tiling: Tiling, num_heads: int, dtype: torch.dtype) -> None:
        self._mask: Tensor | None = None
        if tiling.valid is not None and any(block.valid is not None for block in tiling.blocks):
            self._mask = tiling.valid.to(dtype)[None, None, :, :, None].expand(-1, num_heads, -1, -1, -1)

    def block(self, block: Block, g: Tensor | None) -> BlockFactors:
        mask = self.query(block, g)
        return BlockFactors(mask, mask, None, None, None)

    def query(self, block: Block, g: Tensor | None) -> Tensor | None:
        return None if self._mask is None else self._mask[:, :, block.chunks, : block.chunk_size]

    def enter(self, block: Block) -> None:
        return None

    @property
    def totals(self) -> None:
        return None

    def is_wide(self, block: Block) -> bool:
        return False

    def wide_scores(self, block: Block, g: Tensor | None, q: Tensor, k: Tensor) -> tuple[Tensor, WideScores]:
        raise AssertionError("nothing decays, so no chunk is wide")


class HeadFactors(Factors):
    """One decay a head (D = 1), the same for all tokens or not: everything is formed once a call, H numbers a token.

    Sums and exponentials are float64: they are few, and no difference of two sums loses anything that float32 would show.
    """

    def __init__(self, cumulative: Tensor, tiling: Tiling, dtype: torch.dtype, state_dtype: torch.dtype) -> None:
        """cumulative: b in float64, ``[B or 1, H, N, C]``; a stride of 0 in N says that all chunks are alike."""
        self._cumulative = cumulative
        rows = cumulative
        alike = cumulative.stride(2) == 0 and tiling.valid is None
        if alike:
            rows = cumulative[:, :, :1]
        first, last = rows[..., 0], rows[..., -1]
        middle = (first + last) / 2
        wide = (first - last) / 2 > MAX_HALF_RANGE[dtype]
        query_reference, key_reference = torch.where(wide, 0.0, middle), torch.where(wide, last, middle)
        query = (rows - query_reference[..., None]).exp()
        key = (key_reference[..., None] - rows).exp()
        if tiling.valid is not None:
            query, key = query * tiling.valid, key * tiling.valid

        def every_chunk(x: Tensor) -> Tensor:
            return x.expand(-1, -1, tiling.num_chunks, *x.shape[3:]) if alike else x

        def of_state(x: Tensor) -> Tensor:
            return every_chunk(x.exp().to(state_dtype)[..., None, None])

        self._query = every_chunk(query.to(dtype).unsqueeze(-1))
        self._key = every_chunk(key.to(dtype).unsqueeze(-1))
        self._enter, self._leave = of_state(query_reference), of_state(last - key_reference)
        self._total = of_state(last)
        self._prefix = prefix_of_chunks(every_chunk(last), tiling, state_dtype)[..., None, None]
        flags = wide_chunks(wide)
        self._wide = flags * tiling.num_chunks if alike else flags

    def block(self, block: Block, g: Tensor | None) -> BlockFactors:
        chunks, size = block.chunks, block.chunk_size
        return BlockFactors(
            query=self._query[:, :, chunks, :size],
            key=self._key[:, :, chunks, :size],
            enter=self._enter[:, :, chunks],
            leave=self._leave[:, :, chunks],
            prefix=self._prefix[:, :, chunks],
        )

    def query(self, block: Block, g: Tensor | None) -> Tensor:
        return self._query[:, :, block.chunks, : block.chunk_size]

    def enter(self, block: Block) -> Tensor:
        return self._enter[:, :, block.chunks]

    @cached_property
    def totals(self) -> tuple[Tensor, ...]:
        return self._total.unbind(2)

    def is_wide(self, block: Block) -> bool:
        return any_chunk(self._wide, block)

    def wide_scores(self, block: Block, g: Tensor | None, q: Tensor, k: Tensor) -> tuple[Tensor, WideScores]:
        b = self._cumulative[:, :, block.chunks, : block.chunk_size]
        decay = (b.unsqueeze(-1) - b.unsqueeze(-2)).clamp_(max=0.0).exp_().tril_()
        if block.valid is not None:
            decay = decay * (block.valid[:, :, None] & block.valid[:, None, :])
        decay = decay.to(q.dtype)
        return (q @ k.mT) * decay, _PairwiseScores(q, k, decay)


@dataclass(frozen=True)
class _PairwiseScores(WideScores):
    """Scores (q kᵀ) ⊙ e^{b_t − b_s}, the decays formed pair by pair."""

    q: Tensor
    k: Tensor
    decay: Tensor

    def backward(self, grad_scores: Tensor) -> tuple[Tensor, Tensor]:
        grad = grad_scores * self.decay
        return grad @ self.k, grad.mT @ self.q


def constant_factors(log_decay: Tensor, tiling: Tiling, dtype: torch.dtype, state_dtype: torch.dtype) -> Factors:
    """Factors of a constant log decay a head, ``log_decay [H]``."""
    decay = log_decay.detach().to(torch.float64).clamp(min=LOWEST_LOG_DECAY)
    places = torch.arange(1, tiling.chunk_size + 1, device=decay.device, dtype=torch.float64)
    if tiling.valid is None:
        cumulative = (decay[:, None, None] * places)[None].expand(1, -1, tiling.num_chunks, -1)
    else:
        cumulative = (decay[:, None, None] * torch.minimum(places, tiling.valid.sum(-1)[:, None]))[None]
    return HeadFactors(cumulative, tiling, dtype, state_dtype)


def token_factors(g: Tensor, tiling: Tiling, dtype: torch.dtype, state_dtype: torch.dtype) -> Factors:
    """Factors of log decays a token and head, ``g [B, T, H]``."""
    spread = tiling.spread(g.detach()).permute(0, 3, 1, 2).to(torch.float64).clamp(min=LOWEST_LOG_DECAY)
    if tiling.valid is not None:
        spread = spread * tiling.valid
    return HeadFactors(spread.cumsum(-1), tiling, dtype, state_dtype)


class ChannelFactors(Factors):
    """One decay a token and key channel (D = K), ``g [B, T, H, K]``: formed block by block, as they are as large as q.

    A wide block forms its scores by halves: a chunk is cut in two again and again, and in each cut the later half's queries meet
    the earlier half's keys through the decay to the cut and from it, neither of which exceeds 1.
    """

    def __init__(self, g: Tensor, tiling: Tiling, dtype: torch.dtype, state_dtype: torch.dtype) -> None:
        self._dtype, self._state_dtype = dtype, state_dtype
        spread = tiling.spread(g.detach()).permute(0, 3, 1, 2, 4)
        first = spread[:, :, :, 0].to(state_dtype).clamp(min=LOWEST_LOG_DECAY)
        if tiling.valid is not None:
            spread = spread * tiling.valid[..., None]
        total = spread.to(state_dtype).clamp(min=LOWEST_LOG_DECAY).sum(3)
        self._total = total.exp().unsqueeze(-1)
        middle, wide = (first + total) / 2, (first - total) / 2 > MAX_HALF_RANGE[dtype]
        self._query_reference, self._key_reference = torch.where(wide, 0.0, middle), torch.where(wide, total, middle)
        self._enter = self._query_reference.exp().unsqueeze(-1)
        self._leave = (total - self._key_reference).exp().unsqueeze(-1)
        self._wide = wide_chunks(wide.any(-1))
        self._prefix = prefix_of_chunks(total, tiling, state_dtype).unsqueeze(-1)

    @cached_property
    def totals(self) -> tuple[Tensor, ...]:
        return self._total.unbind(2)

    def _decays(self, block: Block, g: Tensor | None) -> Tensor:
        """g of the block, ``[B, H, n, c, K]`` in the dtype of the states; zero at padding."""
        assert g is not None
        decays = block.take(g).to(self._state_dtype, memory_format=torch.contiguous_format, copy=True)
        decays.clamp_(min=LOWEST_LOG_DECAY)
        return decays if block.valid is None else decays * block.valid[..., None]

    are_large = True

    def block(self, block: Block, g: Tensor | None) -> BlockFactors:
        b = self._decays(block, g).cumsum(3)
        key = (self._key_reference[:, :, block.chunks].unsqueeze(3) - b).exp_()
        query = b.sub_(self._query_reference[:, :, block.chunks].unsqueeze(3)).exp_()
        return self._factors(block, self._masked(block, query), self._masked(block, key))

    def restore(self, block: Block, g: Tensor | None, query: Tensor) -> BlockFactors:
        # Both are about one reference unless a chunk is wide.
        if self.is_wide(block):
            return self.block(block, g)
        key = query.reciprocal()
        return self._factors(
            block, query, key if block.valid is None else key.masked_fill(~block.valid[..., None], 0.0)
        )

    def query(self, block: Block, g: Tensor | None) -> Tensor:
        b = self._decays(block, g).cumsum(3)
        query = b.sub_(self._query_reference[:, :, block.chunks].unsqueeze(3)).exp_()
        return self._masked(block, query).to(self._dtype)

    @staticmethod
    def _masked(block: Block, factor: Tensor) -> Tensor:
        return factor if block.valid is None else factor * block.valid[..., None]

    def _factors(self, block: Block, query: Tensor, key: Tensor) -> BlockFactors:
        return BlockFactors(
            query=query.to(self._dtype),
            key=key.to(self._dtype),
            enter=self._enter[:, :, block.chunks],
            leave=self._leave[:, :, block.chunks],
            prefix=self._prefix[:, :, block.chunks],
        )

    def enter(self, block: Block) -> Tensor:
        return self._enter[:, :, block.chunks]

    def is_wide(self, block: Block) -> bool:
        return any_chunk(self._wide, block)

    def wide_scores(self, block: Block, g: Tensor | None, q: Tensor, k: Tensor) -> tuple[Tensor, WideScores]:
        scores = HalvedScores(q, k, self._decays(block, g), block.valid)
        return scores.forward(), scores


class HalvedScores(WideScores):
    """Scores ``Σ_k q_tk k_sk e^{b_tk − b_sk}`` for s ≤ t at any decay, by halves; q, k, g ``[B, H, n, c, K]``."""

    def __init__(self, q: Tensor, k: Tensor, g: Tensor, valid: Tensor | None) -> None:
        if valid is not None:
            q, k = q * valid[..., None], k * valid[..., None]
        self.size = q.shape[3]
        self.valid = valid
        padding = (0, 0, 0, (1 << (self.size - 1).bit_length()) - self.size)
        self.q, self.k, self.g = (torch.nn.functional.pad(x, padding) for x in (q, k, g))

    def _halves(self, half: int) -> tuple[Tensor, Tensor]:
        """Decay from the cut to each later token and from each earlier token to the cut, ``[B, H, n, cuts, half, K]``."""
        g = self.g.unflatten(3, (-1, 2, half))
        later = g[:, :, :, :, 1].cumsum(-2).exp()
        # What lies between a token and the cut excludes the token itself.
        earlier = g[:, :, :, :, 0]
        earlier = (earlier.flip(-2).cumsum(-2).flip(-2) - earlier).exp()
        return later.to(self.q.dtype), earlier.to(self.q.dtype)

    def _sizes(self) -> list[int]:
        sizes, half = [], self.q.shape[3] // 2
        while half:
            sizes.append(half)
            half //= 2
        return sizes

    @staticmethod
    def _squares(scores: Tensor, half: int) -> Tensor:
        """The squares (later half × earlier half) of each cut, a view ``[B, H, n, cuts, half, half]`` of scores ``[..., C, C]``."""
        cuts = scores.shape[-1] // (2 * half)
        blocks = scores.unflatten(-1, (cuts, 2, half)).unflatten(-4, (cuts, 2, half))
        # [..., cut, 2, half, cut, 2, half]: the diagonal over cuts, then (later, earlier).
        return blocks.diagonal(dim1=3, dim2=6)[:, :, :, 1, :, 0].permute(0, 1, 2, 5, 3, 4)

    def forward(self) -> Tensor:
        """Scores ``[B, H, n, c, c]``."""
        size = self.q.shape[3]
        scores = self.q.new_zeros(*self.q.shape[:3], size, size)
        scores.diagonal(dim1=-2, dim2=-1).copy_((self.q * self.k).sum(-1))
        for half in self._sizes():
            later, earlier = self._halves(half)
            q, k = self.q.unflatten(3, (-1, 2, half))[:, :, :, :, 1], self.k.unflatten(3, (-1, 2, half))[:, :, :, :, 0]
            self._squares(scores, half).copy_((q * later) @ (k * earlier).mT)
        return scores[..., : self.size, : self.size]

    def backward(self, grad_scores: Tensor) -> tuple[Tensor, Tensor]:
        extra = self.q.shape[3] - self.size
        grads = torch.nn.functional.pad(grad_scores, (0, extra, 0, extra))
        diagonal = grads.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        dq, dk = diagonal * self.k, diagonal * self.q
        for half in self._sizes():
            later, earlier = self._halves(half)
            q, k = self.q.unflatten(3, (-1, 2, half))[:, :, :, :, 1], self.k.unflatten(3, (-1, 2, half))[:, :, :, :, 0]
            squares = self._squares(grads, half)
            dq.unflatten(3, (-1, 2, half))[:, :, :, :, 1] += (squares @ (k * earlier)) * later
            dk.unflatten(3, (-1, 2, half))[:, :, :, :, 0] += (squares.mT @ (q * later)) * earlier
        dq, dk = dq[:, :, :, : self.size], dk[:, :, :, : self.size]
        if self.valid is None:
            return dq, dk
        # The gradient of a padded row is somebody else's.
        return dq * self.valid[..., None], dk * self.valid[..., None]


def prefix_of_chunks(totals: Tensor, tiling: Tiling, state_dtype: torch.dtype) -> Tensor:
    """Decay from the start of the piece to each chunk, for the pieces that continue a document; totals ``[B or 1, H, N, ...]``."""
    prefix = torch.zeros(totals.shape, dtype=state_dtype, device=totals.device)
    for entry in tiling.pieces:
        if not entry.piece.starts_document:
            chunks = totals[:, :, entry.first_chunk : entry.last_chunk]
            prefix[:, :, entry.first_chunk : entry.last_chunk] = (chunks.cumsum(2) - chunks).exp().to(state_dtype)
    return prefix


def wide_chunks(wide: Tensor) -> tuple[bool, ...]:
    """For each chunk whether it is wide in any row or head; wide ``[B or 1, H, N]``."""
    # Reading flags back is free on the CPU; elsewhere it would make the host wait, so every chunk takes the safe form.
    if wide.device.type != "cpu":
        return (True,) * wide.shape[2]
    return tuple(wide.any(0).any(0).tolist())


def any_chunk(flags: tuple[bool, ...], block: Block) -> bool:
    """Whether a flag is set for any chunk of the block."""
    if isinstance(block.chunks, slice):
        return any(flags[block.chunks])
    return any(flags[chunk] for chunk in block.chunks.tolist())
