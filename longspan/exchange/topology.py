"""What an exchange topology is: a dataclass of options that knows what it serves, what it costs, and who carries it out.

A `Topology` is what a user names or builds. For an exchange at hand `Topology.resolve` gives a `Carrier`: `Carrier.start` sends,
and `Handle.wait` returns the state that enters each of this rank's segments.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from longspan.errors import InputError
from longspan.exchange.problem import problem_of, stated_cluster_of
from longspan.layout import SequenceLayout
from longspan.plan import Cluster, Cost, DirectionCost, Problem
from longspan.state import Form, Pair


@dataclass(frozen=True)
class Arrived:
    """What a forward exchange brings.

    incoming: ``[num_segments, B, H, K, V]``, the state that enters each of this rank's segments from all earlier ones.
    context: the tensors that the reverse exchange of the same carrier needs.
    """

    incoming: Tensor
    context: tuple[Tensor, ...]


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


class Carrier(ABC):
    """Carries an exchange out: the exclusive scan of all segments' pairs over the ranks of a layout's group."""

    @abstractmethod
    def start(self, pair: Pair, layout: SequenceLayout) -> Handle:
        """Begin the forward exchange.

        pair: this rank's segments, in local order: U ``[num_segments, B, H, K, V]``; the transitions of the same segments, or of
        all segments of the layout in global order where `Transition.is_known`.
        """

    @abstractmethod
    def start_reverse(
        self, kind: Form, context: tuple[Tensor, ...], grad_incoming: Tensor, layout: SequenceLayout
    ) -> ReverseHandle:
        """Begin the backward exchange of G ``[num_segments, B, H, K, V]``, with the context that the forward one returned.

        kind: the form of the forward exchange's transitions.
        """


class Exchanger(ABC):
    """What an operator's `exchange` is: a topology, or a choice among them."""

    @abstractmethod
    def resolve(self, pair: Pair, layout: SequenceLayout) -> Carrier:
        """Who carries this exchange out, forward and backward; called once for an exchange. See `Carrier.start` for the arguments.

        Raises:
            LongspanError: on every rank alike and before any communication, where the exchange cannot be carried out so.
        """

    @abstractmethod
    def modelled(self, pair: Pair, layout: SequenceLayout) -> tuple[Cost, Cluster]:
        """The cost of this exchange by the model, and the machines that it assumes; see `Carrier.start` for the arguments."""


@dataclass(frozen=True)
class Topology(Exchanger):
    """A way for states to reach the segments after them, with its options.

    Args:
        state_dtype: ``torch.bfloat16`` rounds states, and gradients of states, for their way between ranks: half the bytes. Sums
            and transitions keep the dtype of the states. None sends states as they are, in float32 (float64 for float64 inputs).

    Raises:
        InputError: for a value out of range.
    """

    state_dtype: torch.dtype | None = None

    name: ClassVar[str]
    """What users call it; see docs/exchange.md."""

    def __post_init__(self) -> None:
        check_state_dtype(self.state_dtype)

    def serves(self, pair: Pair, layout: SequenceLayout, cluster: Cluster) -> bool:
        """Whether a choice may take it: whether it can carry this exchange out, and is meant for such a cluster.

        Called on every rank alike; sends nothing, unless `cluster` has several nodes.
        """
        return True

    def settled(self, problem: Problem, cluster: Cluster) -> Topology:
        """The same topology, with the options that were left open set to what costs least."""
        return self

    def resolve(self, pair: Pair, layout: SequenceLayout) -> Carrier:
        assert isinstance(self, Carrier)
        return self

    def modelled(self, pair: Pair, layout: SequenceLayout) -> tuple[Cost, Cluster]:
        cluster = stated_cluster_of(layout, pair.state.device.type)
        return self.cost(problem_of(pair, layout, self.state_dtype), cluster), cluster

    def cost(self, problem: Problem, cluster: Cluster) -> Cost:
        """What one exchange costs by the model.

        Args:
            problem: sizes. Its ranks are the cluster's.
            cluster: machines.

        Raises:
            InputError: where problem and cluster have different numbers of ranks.
        """
        if problem.num_ranks != cluster.num_ranks:
            raise InputError(
                f"the problem has {problem.num_ranks} ranks and the cluster {cluster.num_ranks}: take "
                "cluster.with_ranks(problem.num_ranks), or measure the group in question"
            )
        return Cost(
            self.name, self.direction_cost(problem, cluster, False), self.direction_cost(problem, cluster, True)
        )

    @abstractmethod
    def direction_cost(self, problem: Problem, cluster: Cluster, backward: bool) -> DirectionCost:
        """The cost of one direction; every option is settled, or taken as `settled` would."""


def check_state_dtype(state_dtype: torch.dtype | None) -> None:
    """Raise InputError for a dtype in which states do not travel."""
    if state_dtype not in (None, torch.bfloat16):
        raise InputError(
            "state_dtype must be None (states travel in their own dtype, float32 or float64) or torch.bfloat16; "
            f"got {state_dtype!r}"
        )


@dataclass(frozen=True)
class Priced:
    """A topology with every option settled, and what an exchange costs with it by the model."""

    topology: Topology
    cost: Cost

    @property
    def seconds(self) -> float:
        """Forward and backward."""
        return self.cost.seconds


def by_cost(topologies: Iterable[Topology], problem: Problem, cluster: Cluster) -> list[Priced]:
    """The topologies with their costs, cheapest first; of two equal ones, the one named first.

    Raises:
        InputError: where problem and cluster have different numbers of ranks.
    """
    settled = [topology.settled(problem, cluster) for topology in topologies]
    return sorted((Priced(topology, topology.cost(problem, cluster)) for topology in settled), key=lambda p: p.seconds)
