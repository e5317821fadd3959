"""What all memories share: they belong to the step that wrote them."""

from __future__ import annotations

from typing import NoReturn, Protocol, SupportsIndex, TypeVar

from torch import Tensor

from longspan.errors import InputError

State = TypeVar("State", covariant=True)


class Memory(Protocol[State]):
    """What `longspan.write` returns: read it with queries, once or several times.

    State is a tensor ``[B, H, K, V]`` for linear attention, and a pair of tensors ``[B, L, H_kv, D]`` for softmax attention.
    """

    def read(self, q: Tensor, scale: float | None = None) -> Tensor:
        """What the tokens read: o ``[B, T, H, V]`` for q ``[B, T, H_k, K]``; the first read waits for the exchange.

        Raises:
            InputError: for a q or a scale that does not fit, or where what was written has been changed in place since.
        """
        ...

    def final_state(self) -> State:
        """The state after the last token (of each document), on every rank.

        Raises:
            InputError: where the memory was written without ``output_final_state=True``.
        """
        ...


class StateMemory(Memory[Tensor], Protocol):
    """A memory of linear attention."""

    def read_overlapped(self, q: Tensor, scale: float | None = None) -> Tensor:
        """`read`, in LASP-2's own schedule: what tokens read inside their chunks is computed before the exchange is waited for."""
        ...


class KeyMemory(Memory[tuple[Tensor, Tensor]], Protocol):
    """A memory of softmax attention."""

    def read(
        self,
        q: Tensor,
        scale: float | None = None,
        *,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """As in `Memory`, with scores that are bounded, and sinks: see `longspan.softmax_attention`."""
        ...


class StepMemory:
    """What `write` returns: part of one step's graph, and perhaps of an exchange that is on its way.

    A copy would read what only the original's backward gives back to other ranks, so there is none.
    """

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise InputError(
            f"a {type(self).__name__} belongs to the step and the ranks that wrote it, and can be neither copied nor pickled. "
            "Hand it on as it is, and read it several times; keep a final state (output_final_state=True), or write again"
        )
