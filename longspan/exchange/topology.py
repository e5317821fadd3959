"""What an exchange topology is: `start` sends, `wait` returns the state that enters each of this rank's segments."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from longspan.layout import SequenceLayout
from longspan.state import Pair, Transition


@dataclass(frozen=True)
class Arrived:
    """What a forward exchange brings.

    incoming: ``[num_segments, B, H, K, V]``, the state that enters each of this rank's segments from all earlier ones.
    context: the transition parameters that the reverse exchange of the same topology needs.
    """

    incoming: Tensor
    context: Tensor


class Handle(ABC):
    """A forward exchange under way."""

    @abstractmethod
    def wait(self) -> Arrived:
        """Wait until it has arrived; to be called once, on every rank in the same order as the starts."""


class ReverseHandle(ABC):
    """A backward exchange under way."""

    @abstractmethod
    def wait(self) -> Tensor:
        """λ ``[num_segments, B, H, K, V]``, the gradient of the state that leaves each of this rank's segments."""


class Topology(ABC):
    """A way to compute the exclusive scan of all segments' pairs over the ranks of a layout's group."""

    name: str

    def resolve(self, pair: Pair, layout: SequenceLayout) -> Topology:
        """The topology that carries this exchange out, forward and backward; called once, before `start`.

        Raises LongspanError, on every rank alike and before any communication, where it cannot.
        """
        return self

    @abstractmethod
    def start(self, pair: Pair, layout: SequenceLayout) -> Handle:
        """Begin the forward exchange.

        pair: this rank's segments, in local order: U ``[num_segments, B, H, K, V]``; the transitions of the same segments, or of
        all segments of the layout in global order where `Transition.is_known`.
        """

    @abstractmethod
    def start_reverse(
        self, kind: type[Transition], context: Tensor, grad_incoming: Tensor, layout: SequenceLayout
    ) -> ReverseHandle:
        """Begin the backward exchange of G ``[num_segments, B, H, K, V]``, with the context that the forward one returned."""


class Unresolved(Topology):
    """A topology that must see the problem first: `resolve` returns the one that carries the exchange out."""

    @abstractmethod
    def resolve(self, pair: Pair, layout: SequenceLayout) -> Topology: ...

    def start(self, pair: Pair, layout: SequenceLayout) -> Handle:
        return self.resolve(pair, layout).start(pair, layout)

    def start_reverse(
        self, kind: type[Transition], context: Tensor, grad_incoming: Tensor, layout: SequenceLayout
    ) -> ReverseHandle:
        raise AssertionError(f"the topology that {type(self).__name__}.resolve returned does this")
