"""What a variant of linear attention is: one object a file of `longspan.ops`, listed in `longspan.ops.variants.VARIANTS`.

The recurrent form is the definition; everything else is compared with it. The chunk form works in phases (write, then read) on
one rank's tokens: it knows pieces and documents, and nothing of ranks, groups or exchanges.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from longspan.layout import SequenceLayout
from longspan.ops.gates import DecayKind, Gate, Gates
from longspan.state import Transition


class RecurrentForm(Protocol):
    """The definition of a variant, token by token, in any floating dtype, for one document on one device.

    q, k ``[B, T, H, K]``; v ``[B, T, H, V]`` (see `Variant.has_steps`); gates by name; scale a number; initial_state
    ``[B, H, K, V]``. Returns o ``[B, T, H, V]`` and the state after the last token ``[B, H, K, V]``.
    """

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, scale: float, initial_state: Tensor
    ) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class SecondPass:
    """What a form does more in an overlapped read.

    chunk_size: tokens inside whose chunks the first pass reads. num_launches: operators that the second pass calls however few
    tokens there are, forward, and as many backward.
    """

    chunk_size: int
    num_launches: int


class ChunkForm(ABC):
    """The chunk form of one call on one rank's tokens; made by `Variant.prepare`, written once, then read."""

    @abstractmethod
    def write(
        self, k: Tensor, v: Tensor, start_states: Tensor | None, end_pieces: Sequence[int], sent_pieces: Sequence[int]
    ) -> Tensor:
        """Compute what the tokens write, before anything arrives from elsewhere.

        start_states: ``[number of pieces that start a document, B, H, K, V]``, or None for zeros. end_pieces: numbers of the
        pieces whose end state is asked for. sent_pieces: those among them whose end state another rank receives.

        Returns ``[len(end_pieces), B, H, K, V]``: the states that leave those pieces, every piece starting from zero or from its
        document's start state. Only the rows of `sent_pieces` need hold them; the others may be anything that is finite.
        """

    @abstractmethod
    def read(self, q: Tensor, wait: Callable[[], Tensor | None], scale: float, overlapped: bool) -> Tensor:
        """o ``[B, T, H, V]``.

        wait: returns the state that enters each segment, ``[num_segments, B, H, K, V]``, or None where nothing arrives; to be
        called once. overlapped: compute all that needs no state before waiting, at the price of a second pass.
        """

    @property
    @abstractmethod
    def second_pass(self) -> SecondPass | None:
        """How an overlapped read is two passes over the outputs; None where it is the fused one, or a whole call more."""

    @abstractmethod
    def final_states(self, pieces: Sequence[int], rows: Sequence[int], incoming: Tensor | None) -> Tensor:
        """The true states that leave `pieces`, ``[len(pieces), B, H, K, V]``; rows: where they stand in `write`'s result."""

    @abstractmethod
    def transition(self, ranges: Sequence[tuple[int, int]]) -> Transition:
        """The transitions of runs of local tokens ``[start, stop)``; anything for a run in which a document starts."""


class Variant(ABC):
    """A variant of linear attention."""

    name: str
    decay: DecayKind
    """What decays; the log decays' shape, the form of A, the chunk form's factors and the kernels follow from it."""

    has_steps: bool = False
    """Whether a token writes N times before it is read, in order: k and v are ``[B, T, N, H, ·]``, and gates may have N."""

    has_slots: bool = False
    """Whether the state is M slots of a key and a value, ``[M, K + V]``, of which gates have one number each, and a query reads
    them by a softmax."""

    @property
    def gates(self) -> tuple[Gate, ...]:
        """The arguments beside q, k and v."""
        return self.decay.gates

    @property
    def transition(self) -> type[Transition]:
        """The form of A: what ranks send."""
        return self.decay.transition

    def state_size(self, key_size: int, value_size: int, num_slots: int) -> tuple[int, int]:
        """The numbers of a head's state: K and V, unless it holds slots."""
        return (num_slots, key_size + value_size) if self.has_slots else (key_size, value_size)

    def num_slots(self, gates: Gates) -> int:
        """M, as the first gate of slots has it; 0 where there is none."""
        slots = (gates[gate.name].shape[-1:] for gate in self.gates if "M" in gate.dims and gate.name in gates)
        return next((size[0] for size in slots if size), 0)

    backends: tuple[str, ...] = ("torch",)
    """Which of `longspan.ops.backends.BACKENDS` it has; ``"torch"`` always."""

    @abstractmethod
    def recurrent(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, scale: float, initial_state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The definition; see `RecurrentForm`."""

    @abstractmethod
    def prepare(
        self, k: Tensor, v: Tensor, gates: Gates, layout: SequenceLayout, chunk_size: int | None, backend: str
    ) -> ChunkForm:
        """Begin a call of the chunk form on the tokens that `layout` gives this rank, with one of `backends`."""
