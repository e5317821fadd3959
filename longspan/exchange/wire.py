"""What travels: states, with their transitions where these must be sent, as rows of one buffer.

States travel in their own dtype, or rounded to a narrower one (`state_dtype`) for the wire alone. Transitions always travel in
their own dtype, float32 or float64, because products of many of them leave a state's error behind; beside narrower states their
bits are laid out as numbers of the states' wire dtype, and nothing but copies ever touches them. So one buffer of one dtype
serves every collective.

Shapes: n rows; a row holds u numbers of a state and a numbers of its transition (0 where it is not sent).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor


def pack(states: Tensor, parameter: Tensor | None = None, state_dtype: torch.dtype | None = None) -> Tensor:
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


def unpack_states(rows: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The states of `pack`'s rows: ``[n, *shape]`` in `dtype`; shares memory with `rows` where no conversion is needed."""
    return rows[:, : prod(shape)].to(dtype).unflatten(1, tuple(shape))


def unpack_parameter(rows: Tensor, state_shape: Sequence[int], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The transitions' parameter of `pack`'s rows: ``[n, *shape]`` in `dtype`, bit for bit, in memory of its own.

    A copy, for two reasons: the bits of an odd number of narrow states leave it unaligned, and what is kept for the backward
    exchange must not keep everyone's states alive.
    """
    bits = rows[:, prod(state_shape) :].clone(memory_format=torch.contiguous_format)
    return bits.view(dtype).unflatten(1, tuple(shape))


def wire_bytes(num_states: int, num_parameters: int, dtype: torch.dtype, state_dtype: torch.dtype | None = None) -> int:
    """Bytes of `num_states` numbers of states and `num_parameters` of transitions on the wire, for states of `dtype`."""
    return num_states * (state_dtype or dtype).itemsize + num_parameters * dtype.itemsize
