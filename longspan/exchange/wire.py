"""What travels: states, with their transitions where these must be sent, as rows of one buffer.

States travel in their own dtype, or rounded to a narrower one (`state_dtype`) for the wire alone. Transitions always travel in
their own dtype, float32 or float64, because many of them are multiplied with each other, and their errors grow with every
product. Beside narrower states their bits are laid out as numbers of the states' wire dtype, and nothing but copies ever touches
them. So one buffer of one dtype serves every collective.

Behind each row there may be a header of 8 bytes, which says which exchange it belongs to. Formulas of bytes leave it out.

Shapes: n rows; a row holds u numbers of a state and a numbers of its transition (0 where it is not sent).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

HEADER_BYTES = 8


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
    width = prod(shape) * dtype.itemsize // rows.element_size()
    bits = rows[:, prod(state_shape) : prod(state_shape) + width].clone(memory_format=torch.contiguous_format)
    return bits.view(dtype).unflatten(1, tuple(shape))
