"""What a variant of linear attention is: one object a file of `longspan.ops`, listed in `longspan.ops.VARIANTS`.

The recurrent form is the definition; everything else is compared with it. The chunk form works in phases (write, then read) on
one rank's tokens: it knows pieces and documents, and nothing of ranks, groups or exchanges.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from longspan.layout import SequenceLayout
from longspan.state import Transition

Gates = Mapping[str, Tensor]


@dataclass(frozen=True)
class Gate:
    """An argument of a variant beside q, k and v.

    dims: its dimensions among B, T, H, K, as in ``"BTH"``. is_log_decay: it must not exceed zero. differentiable: it may require
    a gradient.
    """

    name: str
    dims: str
    is_log_decay: bool = False
    differentiable: bool = True


class RecurrentForm(Protocol):
    """The definition of a variant, token by token, in any floating dtype, for one document on one device.

    q, k ``[B, T, H, K]``; v ``[B, T, H, V]``; gates by name; scale a number; initial_state ``[B, H, K, V]``. Returns o
    ``[B, T, H, V]`` and the state after the last token ``[B, H, K, V]``.
    """

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, scale: float, initial_state: Tensor
    ) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Written:
    """What the write phase leaves on a rank.

    states: opaque to all but the read phase. ends: ``[len(pieces asked for), B, H, K, V]``, the state that leaves each of those
    pieces, every piece starting from zero or from its document's start state.
    """

    states: Tensor
    ends: Tensor


class ChunkForm(ABC):
    """The chunk form of one call on one rank's tokens; made by `Variant.prepare`."""

    @abstractmethod
    def write(self, k: Tensor, v: Tensor, start_states: Tensor | None, end_pieces: Sequence[int]) -> Written:
        """States between chunks, before anything arrives from elsewhere.

        start_states: ``[number of pieces that start a document, B, H, K, V]``, or None for zeros. end_pieces: numbers of the
        pieces whose end state is asked for.
        """

    @abstractmethod
    def read(self, q: Tensor, k: Tensor, v: Tensor, written: Written, incoming: Tensor | None, scale: float) -> Tensor:
        """o ``[B, T, H, V]`` in one pass; incoming ``[num_segments, B, H, K, V]``, the state that enters each segment."""

    @abstractmethod
    def read_inside(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """The part of `read` that depends on no state: what tokens read inside their own chunk."""

    @abstractmethod
    def read_before(self, q: Tensor, written: Written, incoming: Tensor | None, scale: float, inside: Tensor) -> Tensor:
        """`inside` plus the rest of `read`: what tokens read from before their chunk. Overwrites `inside`."""

    @abstractmethod
    def transition(self, ranges: Sequence[tuple[int, int]]) -> Transition:
        """The transitions of runs of local tokens ``[start, stop)``, none of which crosses the start of a document."""


class Variant(ABC):
    """A variant of linear attention."""

    name: str
    transition: type[Transition]
    gates: tuple[Gate, ...]

    @abstractmethod
    def recurrent(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, scale: float, initial_state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The definition; see `RecurrentForm`."""

    @abstractmethod
    def prepare(self, k: Tensor, v: Tensor, gates: Gates, layout: SequenceLayout, chunk_size: int | None) -> ChunkForm:
        """Begin a call of the chunk form on the tokens that `layout` gives this rank."""


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states for activations of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
