"""What travels: states, with their transitions where these must be sent, as rows of one buffer.

States travel in their own dtype, or rounded to a narrower one (`state_dtype`) for the wire alone. Transitions always travel in
their own dtype, float32 or float64, because many of them are multiplied with each other, and their errors grow with every
product. Beside narrower states their bits are laid out as numbers of the states' wire dtype, and nothing but copies ever touches
them. So one buffer of one dtype serves every collective. With a codec (`longspan.exchange.codec`) that dtype is bytes, and states
are its code.

Behind each row there may be a header of 8 bytes, which says which exchange it belongs to. Formulas of bytes leave it out.

Shapes: n rows; a row holds u numbers of a state and a numbers of its transition (0 where it is not sent).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from math import prod

import torch
from torch import Tensor

from longspan.exchange.codec import Codec, ErrorFeedback

HEADER_BYTES = 8


@dataclass(frozen=True)
class Wire:
    """How states travel in one direction of one exchange.

    state_dtype: what they are rounded to; None keeps their own dtype. codec: what makes bytes of them, in place of that; None is
    none. phase: of the exchange. link: which links it is for, where an exchange has several kinds.
    """

    state_dtype: torch.dtype | None = None
    codec: Codec | None = None
    phase: str = "forward"
    link: str = ""
    _sent: count[int] = field(default_factory=count, compare=False, repr=False)

    def pack(self, states: Tensor, parameter: Tensor | None = None) -> Tensor:
        """`pack_pairs` of states ``[n, ..., K, V]``; called in the same order in every exchange of a layer."""
        if self.codec is None:
            return pack_pairs(states, parameter, self.state_dtype)
        heads = states.flatten(-2).flatten(1, -2) if states.dim() > 3 else states.flatten(-2).unsqueeze(1)
        rows = self._encoded(self.codec, heads.contiguous())
        if parameter is None:
            return rows
        return torch.cat([rows, parameter.flatten(1).contiguous().view(torch.uint8)], dim=1)

    def _encoded(self, codec: Codec, heads: Tensor) -> Tensor:
        feedback, key = getattr(codec, "feedback", None), (self.phase, self.link, next(self._sent))
        if isinstance(feedback, ErrorFeedback):
            heads = feedback.added(key, heads)
        rows = torch.cat([part.contiguous().flatten(1).view(torch.uint8) for part in codec.encode(heads)], dim=1)
        if isinstance(feedback, ErrorFeedback):
            feedback.leave(key, heads - codec.decode(rows, *heads.shape[1:]))
        return rows

    def unpack(self, rows: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """`unpack_states`: the states of rows that `pack` made, ``[n, *shape]`` in `dtype`."""
        if self.codec is None:
            return unpack_states(rows, shape, dtype)
        *heads, key_size, value_size = shape
        states = self.codec.decode(rows[:, : self._numbers(shape)], prod(heads), key_size * value_size)
        return states.to(dtype).reshape(rows.shape[0], *shape)

    def unpack_parameter(
        self, rows: Tensor, state_shape: Sequence[int], shape: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        """`unpack_parameter`: the parameter of the transitions in rows that `pack` made, ``[n, *shape]`` in `dtype`."""
        return _unpacked_bits(rows, self._numbers(state_shape), shape, dtype)

    def buffer(self, num_rows: int, shape: Sequence[int], like: Tensor) -> Tensor:
        """Memory for rows of states ``[n, *shape]`` without transitions; like: a tensor of the states' dtype and device."""
        dtype = (self.state_dtype or like.dtype) if self.codec is None else torch.uint8
        return torch.empty((num_rows, self._numbers(shape)), dtype=dtype, device=like.device)

    def _numbers(self, shape: Sequence[int]) -> int:
        """Numbers of the wire's dtype in a row of a state."""
        if self.codec is None:
            return prod(shape)
        *heads, key_size, value_size = shape
        return prod(heads) * self.codec.format.row_bytes(key_size * value_size)


def pack_pairs(states: Tensor, parameter: Tensor | None = None, state_dtype: torch.dtype | None = None) -> Tensor:
    """States and transitions as rows ``[n, numbers]``, contiguous, in the dtype of the wire.

    Args:
        states: ``[n, ...]``, float32 or float64.
        parameter: of their transitions, ``[n, ...]`` in the dtype of `states`; None where transitions are not sent.
        state_dtype: round the states to it; None keeps their own dtype.

    The result may share memory with `states`.
    """
    rows = states.flatten(1).to(state_dtype or states.dtype)
    if parameter is None:
        return rows.contiguous()
    bits = parameter.flatten(1).contiguous().view(rows.dtype)
    return torch.cat([rows, bits], dim=1)


def with_header(rows: Tensor, word: int) -> Tensor:
    """Rows ``[n, numbers]`` with the 8 bytes of `word` behind each, as numbers of their dtype that nothing but copies touches."""
    header = torch.full((1,), word, dtype=torch.int64, device=rows.device).view(rows.dtype)
    return torch.cat([rows, header.expand(rows.shape[0], -1)], dim=1)


def header_words(rows: Tensor) -> Tensor:
    """The words of `with_header`'s rows, int64 ``[n]``."""
    header = rows[:, rows.shape[1] - HEADER_BYTES // rows.element_size() :]
    return header.clone(memory_format=torch.contiguous_format).view(torch.int64).squeeze(1)


def without_header(rows: Tensor) -> Tensor:
    """The rows ``[n, numbers]`` that `with_header` was given, a view."""
    return rows[:, : rows.shape[1] - HEADER_BYTES // rows.element_size()]


def unpack_states(rows: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The states of `pack_pairs`'s rows: ``[n, *shape]`` in `dtype`; shares memory with `rows` where no conversion is needed."""
    return rows[:, : prod(shape)].to(dtype).unflatten(1, tuple(shape))


def unpack_parameter(rows: Tensor, state_shape: Sequence[int], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The transitions' parameter of `pack_pairs`'s rows: ``[n, *shape]`` in `dtype`, bit for bit, in memory of its own.

    A copy, for two reasons: the bits of an odd number of narrow states leave it unaligned, and what is kept for the backward
    exchange must not keep everyone's states alive.
    """
    return _unpacked_bits(rows, prod(state_shape), shape, dtype)


def _unpacked_bits(rows: Tensor, start: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    width = prod(shape) * dtype.itemsize // rows.element_size()
    bits = rows[:, start : start + width].clone(memory_format=torch.contiguous_format)
    return bits.view(dtype).unflatten(1, tuple(shape))
