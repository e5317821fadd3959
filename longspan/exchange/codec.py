"""Codecs: states as fewer bytes for their way between ranks, where whoever asks for it accepts an error with a bound.

A codec takes heads' matrices, float32, and gives bytes; nothing is ever computed with these. The error of one passage over the wire
is bounded for each head by itself (`WireFormat.worst_error`), in the norm that adds up squares. What arrives is taken for what was
sent: gradients pass as if nothing had been rounded, and are coded in the same way on their own way back.

Shapes: n rows of a buffer, H heads of each, m numbers of a head's matrix (K · V, or fewer columns of it), b numbers of a block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass, replace
from math import isfinite, sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.checks import described, is_int
from longspan.errors import InputError
from longspan.plan.wire import SHORT_INDEX, WireFormat

_LARGEST_INT8, _LARGEST_FLOAT8 = 127.0, 448.0
BFLOAT16_ERROR = 2.0**-8
"""Of a number that is rounded to bfloat16: eight digits, the first of which is not stored."""
_FLOAT8_ERROR = 2.0**-4


class Codec(ABC):
    """Turns heads' numbers into bytes, and back."""

    @property
    @abstractmethod
    def format(self) -> WireFormat:
        """What it costs, and how far off what arrives may be."""

    @abstractmethod
    def encode(self, x: Tensor) -> list[Tensor]:
        """Parts of a buffer, each ``[n, ...]`` of any dtype, for x ``[n, H, m]``, float32."""

    @abstractmethod
    def decode(self, rows: Tensor, num_heads: int, numbers: int) -> Tensor:
        """x ``[n, H, m]``, float32, of rows uint8 ``[n, bytes]``."""

    @property
    def remembers_errors(self) -> bool:
        """Whether what a layer's exchange has left out is added to its next one."""
        return False

    def for_another_layer(self) -> Codec:
        """The same codec for exchanges of another layer: without what it remembers of this one's, if anything."""
        return self

    def remembering_nothing(self) -> Codec:
        """The same codec for an exchange that neither takes what earlier ones have left out nor leaves anything to later ones."""
        return self


@dataclass(frozen=True)
class _Scaled(Codec):
    """Numbers as one byte, each block of a head with a scale: its largest number is the largest of the format."""

    block: int = 128

    def __post_init__(self) -> None:
        if not is_int(self.block) or self.block < 1:
            raise InputError(
                f"{type(self).__name__}: block must be an int of at least 1, how many numbers of a head share a scale; got "
                f"{described(self.block)}. Leave it out for 128"
            )

    def encode(self, x: Tensor) -> list[Tensor]:
        numbers = x.shape[-1]
        blocks = F.pad(x, (0, -numbers % self.block)).unflatten(-1, (-1, self.block))
        scales = blocks.abs().amax(-1, keepdim=True) / self._largest
        # Of a block of zeros, or of the smallest numbers, nothing is left; what is not finite makes its block so.
        scaled = torch.where(scales == 0, 0.0, blocks / scales).flatten(-2)[..., :numbers]
        return [self._rounded(scaled), scales.squeeze(-1)]

    def decode(self, rows: Tensor, num_heads: int, numbers: int) -> Tensor:
        split = num_heads * numbers
        scaled = self._widened(rows[:, :split]).unflatten(1, (num_heads, numbers))
        scales = _as(rows[:, split:], torch.float32).unflatten(1, (num_heads, -1))
        padded = F.pad(scaled, (0, -numbers % self.block)).unflatten(-1, (-1, self.block))
        return (padded * scales[..., None]).flatten(-2)[..., :numbers]

    @property
    @abstractmethod
    def _largest(self) -> float:
        """The largest number of the format."""

    @abstractmethod
    def _rounded(self, scaled: Tensor) -> Tensor:
        """Numbers of the format for float32 ones of the same shape, at most `_largest`."""

    @abstractmethod
    def _widened(self, rows: Tensor) -> Tensor:
        """float32 numbers, before scaling, of bytes ``[n, H · m]`` as `_rounded` makes them."""


@dataclass(frozen=True)
class Int8(_Scaled):
    """Whole numbers from −127 to 127, with a float32 scale for each block of a head.

    A number is off by half a scale at most, 1/254 of its block's largest: a block of b by √b / 254 of its norm, where one of its
    numbers is as large as all others together.
    """

    @property
    def format(self) -> WireFormat:
        return WireFormat(
            "int8",
            1,
            sqrt(self.block) / (2 * _LARGEST_INT8),
            self.block,
            passes=_PASSES["int8"],
            starts=_STARTS["int8"],
        )

    @property
    def _largest(self) -> float:
        return _LARGEST_INT8

    def _rounded(self, scaled: Tensor) -> Tensor:
        return scaled.round().clamp(-_LARGEST_INT8, _LARGEST_INT8).to(torch.int8)

    def _widened(self, rows: Tensor) -> Tensor:
        return rows.view(torch.int8).float()


@dataclass(frozen=True)
class Float8(_Scaled):
    """Floating-point numbers of 4 bits of exponent and 3 of fraction (e4m3), with a float32 scale for each block of a head.

    A number is off by 2⁻⁴ of itself at most; below 2⁻⁶ / 448 of its block's largest by 2⁻¹⁰ / 448 of that.
    """

    @property
    def format(self) -> WireFormat:
        smallest = sqrt(self.block) * 2.0**-10 / _LARGEST_FLOAT8
        return WireFormat(
            "float8", 1, _FLOAT8_ERROR + smallest, self.block, passes=_PASSES["float8"], starts=_STARTS["float8"]
        )

    @property
    def _largest(self) -> float:
        return _LARGEST_FLOAT8

    def _rounded(self, scaled: Tensor) -> Tensor:
        return scaled.clamp(-_LARGEST_FLOAT8, _LARGEST_FLOAT8).to(torch.float8_e4m3fn)

    def _widened(self, rows: Tensor) -> Tensor:
        return rows.view(torch.float8_e4m3fn).float()


@dataclass(frozen=True)
class BFloat16(Codec):
    """Numbers rounded to bfloat16, as a topology's ``state_dtype=torch.bfloat16`` does for all links at once: for some of them."""

    @property
    def format(self) -> WireFormat:
        return WireFormat("bfloat16", 2, BFLOAT16_ERROR, passes=_PASSES["bfloat16"], starts=_STARTS["bfloat16"])

    def encode(self, x: Tensor) -> list[Tensor]:
        return [x.bfloat16()]

    def decode(self, rows: Tensor, num_heads: int, numbers: int) -> Tensor:
        return _as(rows, torch.bfloat16).float().unflatten(1, (num_heads, numbers))


class ErrorFeedback:
    """What a layer's exchanges have left out so far, added to what it sends next (error feedback, arXiv 1809.07599).

    It belongs to one layer, whose exchanges must have the same sizes from step to step: with other sizes it begins anew. It is
    in no checkpoint of a run.
    """

    def __init__(self) -> None:
        self._left: dict[Hashable, Tensor] = {}

    def added(self, key: Hashable, x: Tensor) -> Tensor:
        """x, and what was left out under this key."""
        left = self._left.get(key)
        return x if left is None or left.shape != x.shape or left.device != x.device else x + left

    def leave(self, key: Hashable, left: Tensor) -> None:
        """Remember what is left out under this key now. What is not finite is not remembered."""
        self._left[key] = torch.where(left.isfinite(), left, 0.0)


@dataclass(frozen=True)
class TopK(Codec):
    """The largest numbers of each head, with their places; all others arrive as zero.

    Args:
        fraction: which share of a head's numbers is sent, rounded up to a whole number of them. A number sent takes 4 bytes,
            rounded to bfloat16 beside its place (6 in heads of more than 32,768).
        feedback: add what is left out to what the layer sends next: True, or an `ErrorFeedback` of the layer's own.

    All other numbers are at most as large as these, so that a share f of them has at least f of the squares: the error is at most
    √(1 − f), and for numbers of very unequal sizes far less.

    Raises:
        InputError: for a fraction that is no number above 0 and at most 1.
    """

    fraction: float = 0.1
    feedback: bool | ErrorFeedback = False

    def __post_init__(self) -> None:
        given: Any = self.fraction
        if isinstance(given, bool) or not isinstance(given, int | float) or not 0 < given <= 1:
            raise InputError(
                f"TopK: fraction must be a number above 0 and at most 1, the share of a head's numbers that is sent; got "
                f"{described(given)}. Give 0.1 for every tenth"
            )
        if self.feedback is True:
            object.__setattr__(self, "feedback", ErrorFeedback())

    @property
    def format(self) -> WireFormat:
        worst = sqrt(1.0 - self.fraction) + BFLOAT16_ERROR
        # A fraction of one sends all numbers with their places.
        kept = min(self.fraction, 1.0 - 2.0**-40)
        return WireFormat("top_k", 2, worst, kept=kept, passes=_PASSES["top_k"], starts=_STARTS["top_k"])

    def encode(self, x: Tensor) -> list[Tensor]:
        numbers = x.shape[-1]
        # Nothing is left out of what is not a number: it is the largest.
        places = x.abs().topk(self.format.num_kept(numbers), dim=-1, sorted=False).indices
        index = places.to(torch.int16 if numbers <= SHORT_INDEX else torch.int32)
        return [x.gather(-1, places).bfloat16(), index]

    def decode(self, rows: Tensor, num_heads: int, numbers: int) -> Tensor:
        split = 2 * num_heads * self.format.num_kept(numbers)
        values = _as(rows[:, :split], torch.bfloat16).unflatten(1, (num_heads, -1)).float()
        index = torch.int16 if numbers <= SHORT_INDEX else torch.int32
        places = _as(rows[:, split:], index).unflatten(1, (num_heads, -1)).long()
        return values.new_zeros(*values.shape[:2], numbers).scatter_(-1, places, values)

    @property
    def remembers_errors(self) -> bool:
        return isinstance(self.feedback, ErrorFeedback)

    def for_another_layer(self) -> Codec:
        return replace(self, feedback=self.remembers_errors)

    def remembering_nothing(self) -> Codec:
        return replace(self, feedback=False)


# Encoding and decoding states of 16 heads of 128 x 128 took one thread so many times as long as the stated figures give a fold of
# them, and states of a few numbers so many times as long as those give the smallest fold.
_PASSES = {"bfloat16": 1.0, "int8": 4.0, "float8": 6.0, "top_k": 7.0}
_STARTS = {"bfloat16": 1.5, "int8": 6.0, "float8": 6.0, "top_k": 5.0}

CODECS: dict[str, type[Codec]] = {"int8": Int8, "float8": Float8, "top_k": TopK}


def codec_named(codec: Codec | str | None) -> Codec | None:
    """What a topology's `codec` asks for: a name stands for the codec with its options left alone.

    Raises:
        InputError: for a name that does not exist, or a value of another type.
    """
    if codec is None or isinstance(codec, Codec):
        return codec
    name: object = codec
    if not isinstance(name, str) or name not in CODECS:
        raise InputError(
            f"codec must be None, one of {', '.join(map(repr, CODECS))}, or a codec with options such as "
            f"longspan.exchange.TopK(fraction=0.05); got {described(name)}. Leave it out to send states as they are"
        )
    return CODECS[name]()


def codecs_within(max_relative_error: object) -> list[Codec]:
    """What may carry states with at most so large an error of one passage, bfloat16 first.

    Raises:
        InputError: for what is no number, and for an error that nothing keeps to; it says the least that is kept to.
    """
    bound = max_relative_error
    if isinstance(bound, bool) or not isinstance(bound, int | float) or not isfinite(bound):
        raise InputError(
            f"max_relative_error must be a finite number, the error of a head's state that one passage between ranks may make; got "
            f"{described(bound)}. Give 0.05, or leave it out to send states as they are"
        )
    if bound < BFLOAT16_ERROR:
        raise InputError(
            f"max_relative_error is {bound:g}, and no codec keeps to it: the least that is kept to is {BFLOAT16_ERROR}, by "
            "bfloat16. Give at least as much, or leave it out to send states as they are"
        )
    found: list[Codec] = [BFloat16()]
    block = 128
    while block >= _SMALLEST_BLOCK and Int8(block).format.worst_error > bound:
        block //= 2
    if block >= _SMALLEST_BLOCK:
        found.append(Int8(block))
    if Float8().format.worst_error <= bound:
        found.append(Float8())
    # Of two bytes a number with its place for one of a byte without, it is worth it for few numbers alone.
    error = bound - BFLOAT16_ERROR
    if 1.0 - error**2 < _LARGEST_FRACTION:
        found.append(TopK(max(1.0 - error**2, _SMALLEST_FRACTION)))
    return found


_SMALLEST_BLOCK = 8
_LARGEST_FRACTION, _SMALLEST_FRACTION = 0.25, 0.01


def _as(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes ``[n, bytes]`` as numbers; a copy, which is aligned."""
    return rows.clone(memory_format=torch.contiguous_format).view(dtype)
