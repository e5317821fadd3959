"""What the chunk form of a decay needs of its log decays: factors of tokens and of states, block by block.

Shapes: as in `longspan.ops.matrices`; N chunks in all, C tokens per chunk. D is 1 if a head has one decay, K where each key
channel has its own. b_t is the sum of g from the chunk's first token to t, itself included.

Scaling q by e^{b_t} / r and k by r / e^{b_s}, with r in the middle of the chunk's range, turns a decay between two tokens into a
product of two numbers. Where the range of b in a chunk is too wide for that (the chunk is *wide*), products inside the chunk are
formed another way, and what a token adds to the state that leaves its chunk is e^{b_C − b_s}, which does not exceed 1.

Later tokens move r and may make a chunk wide, but change no digit of what earlier tokens read: r is a power of two, so that it
passes through every product without a rounding, and the other way of a wide chunk gives the same digits for as long as the range
up to a token is not too wide itself. A mask is never multiplied in: 0 · ∞ is no mask.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from longspan.ops.gates import DecayKind, LogDecays
from longspan.ops.matrices import batched_product
from longspan.ops.tiling import ChunkBlock, Tiling

# The widest half-range of b in a chunk for which e^b / r and r / e^b are formed apart. float32 and bfloat16 reach e^{±87}:
# at 40 a factor keeps 20 decades above the smallest normal number, and an unmasked product overflows at worst to an infinity
# above the diagonal, which the mask overwrites.
MAX_HALF_RANGE = {torch.float64: 300.0, torch.float32: 40.0, torch.bfloat16: 40.0}

# e^{-1e3} is zero in every dtype: a log decay of −inf becomes this where log decays are summed, so that no difference of two
# infinities arises.
LOWEST_LOG_DECAY = -1e3

# Rows of a wide chunk count as not wide themselves a little further than chunks do, which are judged by another sum.
_MARGIN = 0.01

_LOG2_E = math.log2(math.e)


def power_of_two(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """2^exponent, exactly, for whole numbers of any dtype; 0 below the normal numbers of float32, or float64 if that is `dtype`."""
    if dtype == torch.float64:
        return ((exponent.clamp(-1023, 1023).to(torch.int64) + 1023) << 52).view(torch.float64)
    return ((exponent.clamp(-127, 127).to(torch.int32) + 127) << 23).view(torch.float32).to(dtype)


@dataclass(frozen=True)
class BlockFactors:
    """The factors of one block; None is 1.

    query, key: e^b / r and r / e^b, or e^{b_C − b} for the key of a wide chunk, ``[n, B or 1, H, c, D]`` in the dtype of q; zero
    at padding.
    enter, leave: r (times what query lacks of e^b) and e^{b_C} / r, or 1, ``[n, B or 1, H, D, 1]`` in the dtype of the states.
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
    def block(self, block: ChunkBlock, g: Tensor | None) -> BlockFactors:
        """The factors of one block; `g` are the call's log decays, where they differ from token to token."""

    are_large: ClassVar[bool] = False
    """Whether the factors of tokens are as large as q, so that forming them again costs more than keeping them."""

    def restore(self, block: ChunkBlock, g: Tensor | None, query: Tensor) -> BlockFactors:
        """The factors of one block, given `BlockFactors.query` as `block` made it."""
        return self.block(block, g)

    @abstractmethod
    def query(self, block: ChunkBlock, g: Tensor | None) -> Tensor | None:
        """`BlockFactors.query` of one block, alone."""

    @abstractmethod
    def enter(self, block: ChunkBlock) -> Tensor | None:
        """`BlockFactors.enter` of one block, alone."""

    @property
    @abstractmethod
    def totals(self) -> tuple[Tensor, ...] | None:
        """For each chunk e^{b_C}, ``[B or 1, H, D, 1]`` in the dtype of the states; None is 1."""

    @abstractmethod
    def total(self, block: ChunkBlock) -> Tensor | None:
        """e^{b_C} of the block's chunks, ``[n, B or 1, H, D, 1]`` in the dtype of the states; None is 1."""

    @abstractmethod
    def is_wide(self, block: ChunkBlock) -> bool:
        """Whether any chunk of the block is wide."""

    @abstractmethod
    def wide_scores(
        self, block: ChunkBlock, g: Tensor | None, q: Tensor, k: Tensor, scale: float = 1.0
    ) -> tuple[Tensor, WideScores]:
        """Scores of a wide block, times `scale`, from q and k without factors ``[n, B, H, c, K]``, contiguous.

        ``[n, B, H, c, c]``, zero above the diagonal. In rows up to which the range is not too wide they have the digits of the
        products with `BlockFactors.query` and `BlockFactors.key` of a chunk that ends there.
        """


class WideScores(ABC):
    """What the backward of `Factors.wide_scores` needs."""

    @abstractmethod
    def backward(self, grad_scores: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of q and k, given those of the scores (above the diagonal they are not looked at)."""


class NoDecay(Factors):
    """Nothing decays; only padding is masked."""

    def __init__(self, tiling: Tiling, num_heads: int, dtype: torch.dtype) -> None:
        self._mask: Tensor | None = None
        if tiling.padding is not None and any(block.padding is not None for block in tiling.blocks):
            is_token = (~tiling.padding).to(dtype)[:, None, None, :, None]
            self._mask = is_token.expand(-1, -1, num_heads, -1, -1)

    def block(self, block: ChunkBlock, g: Tensor | None) -> BlockFactors:
        mask = self.query(block, g)
        return BlockFactors(mask, mask, None, None, None)

    def query(self, block: ChunkBlock, g: Tensor | None) -> Tensor | None:
        return None if self._mask is None else self._mask[block.chunks, :, :, : block.chunk_size]

    def enter(self, block: ChunkBlock) -> None:
        return None

    @property
    def totals(self) -> None:
        return None

    def total(self, block: ChunkBlock) -> None:
        return None

    def is_wide(self, block: ChunkBlock) -> bool:
        return False

    def wide_scores(
        self, block: ChunkBlock, g: Tensor | None, q: Tensor, k: Tensor, scale: float = 1.0
    ) -> tuple[Tensor, WideScores]:
        raise AssertionError("nothing decays, so no chunk is wide")


class HeadFactors(Factors):
    """One decay per head (D = 1), the same for all tokens or not: everything is formed once per call, H numbers per token.

    Sums and exponentials are float64: they are few, and no difference of two sums loses anything that float32 would show. e^b is
    split in a fraction in [1, 2), which is rounded once, and a power of two, so that r and the other way of wide chunks change
    nothing but the latter.
    """

    def __init__(self, cumulative: Tensor, tiling: Tiling, dtype: torch.dtype, state_dtype: torch.dtype) -> None:
        """cumulative: b in float64, ``[N, B or 1, H, C]``; a stride of 0 in N says that all chunks are alike."""
        alike = cumulative.stride(0) == 0 and tiling.padding is None
        rows = cumulative[:1] if alike else cumulative
        first, last = rows[..., 0], rows[..., -1]
        wide = (first - last) / 2 > MAX_HALF_RANGE[dtype]
        binary = rows * _LOG2_E
        exponents = binary.floor()
        fractions = (binary - exponents).exp2()
        query_fraction, key_fraction = fractions.to(dtype), fractions.reciprocal().to(dtype)
        first_exponent, last_exponent = exponents[..., 0], exponents[..., -1]
        middle = ((first_exponent + last_exponent) / 2).floor()
        query_reference, key_reference = (
            torch.where(wide, 0.0, middle),
            torch.where(wide, last_exponent, middle),
        )

        def every_chunk(x: Tensor) -> Tensor:
            return x.expand(tiling.num_chunks, *x.shape[1:]) if alike else x

        def of_tokens(fraction: Tensor, exponent: Tensor) -> Tensor:
            factor = (fraction.double() * power_of_two(exponent, torch.float64)).to(dtype)
            return every_chunk(tiling.without_padding(factor).unsqueeze(-1))

        def of_state(x: Tensor) -> Tensor:
            return every_chunk(x.to(state_dtype)[..., None, None])

        self._query = of_tokens(query_fraction, exponents - query_reference[..., None])
        self._key = of_tokens(key_fraction, key_reference[..., None] - exponents)
        self._enter = of_state(power_of_two(query_reference, torch.float64))
        self._leave = of_state(fractions[..., -1] * power_of_two(last_exponent - key_reference, torch.float64))
        self._total = of_state(last.exp())
        self._prefix = prefix_of_chunks(every_chunk(last), tiling, state_dtype)[..., None, None]
        flags = wide_chunks(wide)
        self._wide = flags * tiling.num_chunks if alike else flags
        self._exponents = every_chunk(exponents)
        self._fractions = every_chunk(query_fraction.unsqueeze(-1)), every_chunk(key_fraction.unsqueeze(-1))

    def block(self, block: ChunkBlock, g: Tensor | None) -> BlockFactors:
        chunks, size = block.chunks, block.chunk_size
        return BlockFactors(
            query=self._query[chunks, :, :, :size],
            key=self._key[chunks, :, :, :size],
            enter=self._enter[chunks],
            leave=self._leave[chunks],
            prefix=self._prefix[chunks],
        )

    def query(self, block: ChunkBlock, g: Tensor | None) -> Tensor:
        return self._query[block.chunks, :, :, : block.chunk_size]

    def enter(self, block: ChunkBlock) -> Tensor:
        return self._enter[block.chunks]

    @cached_property
    def totals(self) -> tuple[Tensor, ...]:
        return self._total.unbind(0)

    def total(self, block: ChunkBlock) -> Tensor:
        return self._total[block.chunks]

    def is_wide(self, block: ChunkBlock) -> bool:
        return any_chunk(self._wide, block)

    def wide_scores(
        self, block: ChunkBlock, g: Tensor | None, q: Tensor, k: Tensor, scale: float = 1.0
    ) -> tuple[Tensor, WideScores]:
        chunks, size = block.chunks, block.chunk_size
        query, key = (fractions[chunks, :, :, :size] for fractions in self._fractions)
        exponents = self._exponents[chunks, :, :, :size]
        decay = power_of_two((exponents.unsqueeze(-1) - exponents.unsqueeze(-2)).clamp_(max=0.0), q.dtype).tril_()
        decay = block.without_padding(block.without_padding(decay).mT).mT
        wide = _PairwiseScores(q, k, query * scale, key, decay)
        return wide.forward(), wide


@dataclass(frozen=True)
class _PairwiseScores(WideScores):
    """Scores (q kᵀ) ⊙ e^{b_t − b_s}: of e^b, q and k take the fractions, and each pair the power of two.

    q, k ``[n, B, H, c, K]``; query, key ``[n, B or 1, H, c, 1]``, times the scale; decay ``[n, B or 1, H, c, c]``.
    """

    q: Tensor
    k: Tensor
    query: Tensor
    key: Tensor
    decay: Tensor

    def forward(self) -> Tensor:
        scores = batched_product(self.q * self.query, (self.k * self.key).mT) * self.decay
        # Above the diagonal a product with something that is not finite is no zero.
        return scores.tril_()

    def backward(self, grad_scores: Tensor) -> tuple[Tensor, Tensor]:
        grad = grad_scores.tril() * self.decay
        return (grad @ (self.k * self.key)) * self.query, (grad.mT @ (self.q * self.query)) * self.key


def constant_factors(log_decay: Tensor, tiling: Tiling, dtype: torch.dtype, state_dtype: torch.dtype) -> Factors:
    """Factors of a constant log decay per head, ``log_decay [H]``."""
    decay = log_decay.detach().to(torch.float64).clamp(min=LOWEST_LOG_DECAY)
    places = torch.arange(1, tiling.chunk_size + 1, device=decay.device, dtype=torch.float64)
    if tiling.padding is not None:
        places = torch.minimum(places, (~tiling.padding).sum(-1, keepdim=True)).unsqueeze(1)
    cumulative = (decay[:, None] * places).expand(tiling.num_chunks, -1, -1).unsqueeze(1)
    return HeadFactors(cumulative, tiling, dtype, state_dtype)


def token_factors(g: Tensor, tiling: Tiling, dtype: torch.dtype, state_dtype: torch.dtype) -> Factors:
    """Factors of log decays per token and head, ``g [B, T, H]``."""
    spread = tiling.without_padding(tiling.spread(g.detach()).to(torch.float64).clamp(min=LOWEST_LOG_DECAY))
    return HeadFactors(spread.cumsum(-1), tiling, dtype, state_dtype)


class ChannelFactors(Factors):
    """One decay per token and key channel (D = K), ``g [B, T, H, K]``: formed block by block, as they are as large as q.

    e^b is the product of the decays, not the exponential of their sum, whose digits end where a strong decay's begin. The chunk's
    first decay, which all its tokens share, is left to `enter`.

    A wide block forms its scores by halves: a chunk is cut in two again and again, and in each cut the later half's queries meet
    the earlier half's keys through the decay to the cut and from it, neither of which exceeds 1.
    """

    def __init__(self, g: Tensor, tiling: Tiling, dtype: torch.dtype, state_dtype: torch.dtype) -> None:
        self._dtype, self._state_dtype = dtype, state_dtype
        decays = tiling.without_padding(tiling.spread(g.detach()).to(state_dtype).clamp(min=LOWEST_LOG_DECAY))
        first, total = decays[:, :, :, 0], decays.sum(3)
        span, half = total - first, MAX_HALF_RANGE[dtype]
        self._total = total.exp().unsqueeze(-1)
        self._is_wide_channel = span < -2.0 * half
        self._lowest = math.exp(-2.0 * half - _MARGIN)
        exponent = (span.clamp(min=-2.0 * half) * (_LOG2_E / 2)).round()
        self._enter = (first.exp() * power_of_two(exponent, state_dtype)).unsqueeze(-1)
        self._less_reference = power_of_two(-exponent, state_dtype)
        self._wide = wide_chunks(self._is_wide_channel.any(-1))
        self._prefix = prefix_of_chunks(total, tiling, state_dtype).unsqueeze(-1)

    @cached_property
    def totals(self) -> tuple[Tensor, ...]:
        return self._total.unbind(0)

    def total(self, block: ChunkBlock) -> Tensor:
        return self._total[block.chunks]

    def _decays(self, block: ChunkBlock, g: Tensor | None) -> Tensor:
        """e^g of the block, ``[n, B, H, c, K]`` in the dtype of the states; 1 at a chunk's first token and at padding."""
        assert g is not None
        decays = block.take(g).to(self._state_dtype, memory_format=torch.contiguous_format, copy=True)
        decays = block.without_padding(decays)
        decays[:, :, :, 0] = 0.0
        return decays.exp_()

    are_large = True

    def _query(self, block: ChunkBlock, decays: Tensor) -> Tensor:
        """e^b / r, with the e^g of `_decays`, which it overwrites."""
        # cumprod_ would copy.
        return torch.cumprod(decays, 3).mul_(self._less_reference[block.chunks].unsqueeze(3))

    def block(self, block: ChunkBlock, g: Tensor | None) -> BlockFactors:
        decays = self._decays(block, g)
        query = self._query(block, decays)
        key, leave = query.reciprocal(), query[:, :, :, -1].clone()
        if self.is_wide(block):
            wide = self._is_wide_channel[block.chunks]
            key = torch.where(wide.unsqueeze(3), to_the_end(decays), key)
            leave = leave.masked_fill_(wide, 1.0)
        return self._factors(block, block.without_padding(query), block.without_padding(key), leave)

    def restore(self, block: ChunkBlock, g: Tensor | None, query: Tensor) -> BlockFactors:
        # A wide chunk needs the decays themselves, and padding has hidden the last token's factor.
        if self.is_wide(block) or block.padding is not None:
            return self.block(block, g)
        return self._factors(block, query, query.reciprocal(), query[:, :, :, -1])

    def query(self, block: ChunkBlock, g: Tensor | None) -> Tensor:
        return block.without_padding(self._query(block, self._decays(block, g))).to(self._dtype)

    def _factors(self, block: ChunkBlock, query: Tensor, key: Tensor, leave: Tensor) -> BlockFactors:
        return BlockFactors(
            query=query.to(self._dtype),
            key=key.to(self._dtype),
            enter=self._enter[block.chunks],
            leave=leave.unsqueeze(-1),
            prefix=self._prefix[block.chunks],
        )

    def enter(self, block: ChunkBlock) -> Tensor:
        return self._enter[block.chunks]

    def prefix(self, block: ChunkBlock) -> Tensor:
        """`BlockFactors.prefix` of one block, alone."""
        return self._prefix[block.chunks]

    def is_wide(self, block: ChunkBlock) -> bool:
        return any_chunk(self._wide, block)

    def wide_scores(
        self, block: ChunkBlock, g: Tensor | None, q: Tensor, k: Tensor, scale: float = 1.0
    ) -> tuple[Tensor, WideScores]:
        decays = self._decays(block, g)
        query = self._query(block, decays)
        lowest = self._lowest * self._less_reference[block.chunks].unsqueeze(3)
        is_narrow = block.without_padding((query >= lowest).all(-1, keepdim=True), False)
        key = torch.maximum(query, lowest).reciprocal_().to(self._dtype)
        query = query.to(self._dtype) * scale
        narrow = batched_product(q * query, (k * key).mT).tril_()
        halved = HalvedScores(q, k, decays, block, scale)
        return torch.where(is_narrow, narrow, halved.forward()), halved


def to_the_end(decays: Tensor) -> Tensor:
    """For each token the product of the decays of all tokens behind it, ``[..., c, K]`` like `decays`."""
    product = torch.ones_like(decays)
    product[..., :-1, :] = decays[..., 1:, :].flip(-2).cumprod(-2).flip(-2)
    return product


class HalvedScores(WideScores):
    """Scores ``scale · Σ_k q_tk k_sk e^{b_tk − b_sk}`` for s ≤ t at any decay, by halves; q, k and e^g ``[n, B, H, c, K]``."""

    def __init__(self, q: Tensor, k: Tensor, decays: Tensor, block: ChunkBlock, scale: float) -> None:
        self.size, self.block, self.scale = q.shape[3], block, scale
        q, k = block.without_padding(q), block.without_padding(k)
        padding = (0, 0, 0, (1 << (self.size - 1).bit_length()) - self.size)
        self.q, self.k = (torch.nn.functional.pad(x, padding) for x in (q if scale == 1.0 else q * scale, k))
        self.decays = torch.nn.functional.pad(decays, padding, value=1.0)

    def _halves(self, half: int) -> tuple[Tensor, Tensor]:
        """Decay from the cut to each later token and from each earlier token to the cut, ``[n, B, H, cuts, half, K]``."""
        decays = self.decays.unflatten(3, (-1, 2, half))
        later, earlier = decays[:, :, :, :, 1].cumprod(-2), to_the_end(decays[:, :, :, :, 0])
        return later.to(self.q.dtype), earlier.to(self.q.dtype)

    def _sizes(self) -> list[int]:
        sizes, half = [], self.q.shape[3] // 2
        while half:
            sizes.append(half)
            half //= 2
        return sizes

    @staticmethod
    def _squares(scores: Tensor, half: int) -> Tensor:
        """The squares (later half × earlier half) of each cut, a view ``[n, B, H, cuts, half, half]`` of scores ``[..., C, C]``."""
        cuts = scores.shape[-1] // (2 * half)
        blocks = scores.unflatten(-1, (cuts, 2, half)).unflatten(-4, (cuts, 2, half))
        # [..., cut, 2, half, cut, 2, half]: the diagonal over cuts, then (later, earlier).
        return blocks.diagonal(dim1=3, dim2=6)[:, :, :, 1, :, 0].permute(0, 1, 2, 5, 3, 4)

    def forward(self) -> Tensor:
        """Scores ``[n, B, H, c, c]``."""
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
        # The gradient of a padded row is somebody else's.
        dq = dq if self.scale == 1.0 else dq * self.scale
        return self.block.without_padding(dq), self.block.without_padding(dk)


def prefix_of_chunks(totals: Tensor, tiling: Tiling, state_dtype: torch.dtype) -> Tensor:
    """Decay from the start of the piece to each chunk, for the pieces that continue a document; totals ``[N, B or 1, H, ...]``."""
    prefix = torch.zeros(totals.shape, dtype=state_dtype, device=totals.device)
    for entry in tiling.pieces:
        if not entry.piece.starts_document:
            own = slice(entry.first_chunk, entry.last_chunk)
            prefix[own][:1] = 1.0
            # Taking a chunk's own decay off the sum again would leave its rounding.
            prefix[own][1:] = totals[own][:-1].cumsum(0).exp().to(state_dtype)
    return prefix


def wide_chunks(wide: Tensor) -> tuple[bool, ...]:
    """For each chunk whether it is wide in any row or head; wide ``[N, B or 1, H]``."""
    # Reading flags back is free on the CPU; elsewhere it would make the host wait, so every chunk takes the safe form.
    if wide.device.type != "cpu":
        return (True,) * wide.shape[0]
    return tuple(wide.flatten(1).any(1).tolist())


def any_chunk(flags: tuple[bool, ...], block: ChunkBlock) -> bool:
    """Whether a flag is set for any chunk of the block."""
    return any(flags[chunk] for chunk, _ in block.chunks_and_slots)


def factors_of(
    decays: LogDecays, tiling: Tiling, num_heads: int, dtype: torch.dtype, state_dtype: torch.dtype
) -> Factors:
    """The factors of a call; `decays` on the device of `tiling`, dtype that of q."""
    if decays.values is None:
        return NoDecay(tiling, num_heads, dtype)
    make = {DecayKind.HEAD: constant_factors, DecayKind.TOKEN: token_factors, DecayKind.CHANNEL: ChannelFactors}
    return make[decays.kind](decays.values, tiling, dtype, state_dtype)
