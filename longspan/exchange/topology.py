"""What an exchange topology is: a dataclass of options that knows what it serves, what it costs, and who carries it out.

A `Topology` is what a user names or builds. For an exchange at hand `Topology.resolve` gives a `Carrier`: `Carrier.start` sends,
and `Handle.wait` returns the state that enters each of this rank's segments.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from longspan.checks import described
from longspan.errors import InputError
from longspan.exchange.codec import Codec, codec_named
from longspan.exchange.problem import problem_of, stated_cluster_of
from longspan.exchange.wire import Wire
from longspan.layout import SequenceLayout
from longspan.plan import Cluster, Cost, DirectionCost, Problem, WireFormat
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

    @property
    def remembers_errors(self) -> bool:
        """Whether it has a codec that adds what it has left out to what it sends next, and so belongs to one layer."""
        return False

    def for_another_layer(self) -> Exchanger:
        """The same exchange for another layer, whose codec, if any, remembers that layer's errors alone."""
        return self

    def remembering_nothing(self) -> Exchanger:
        """The same exchange for states that nobody trains on: their errors are no matter of the layer's later ones."""
        return self


SAME = "same"


@dataclass(frozen=True)
class Topology(Exchanger):
    """A way for states to reach the segments after them, with its options.

    Args:
        state_dtype: ``torch.bfloat16`` rounds states, and gradients of states, for their way between ranks: half the bytes. Sums
            and transitions keep the dtype of the states. None sends states as they are, in float32 (float64 for float64 inputs).
        codec: what states, and gradients of states, are coded by for their way between ranks, in place of `state_dtype`: a codec,
            or its name (``"int8"``, ``"float8"``, ``"top_k"``). Sums stay float32, and transitions travel in float32. None is none.
        codec_inside: the same between ranks of a node, where an exchange tells these links from others (`Ring`, `Pipelined`,
            `Neighbour`, `TwoLevel`); ``"same"`` is `codec`. Others refuse another one than `codec`.
        codec_of_hops: of a chain (`Ring`, `Pipelined`, `Neighbour`), in place of all of these, a codec, its name or None for each
            hop: P − 1 of them, the i-th between the i-th and the next of the layout's `rank_order`, both ways. None is one for all.

    Raises:
        InputError: for a value out of range, more than one of a dtype, a codec and codecs of hops, codecs of hops for what is
            no chain, and a codec inside nodes for what does not tell their links apart; at the exchange, for a codec with float64
            states, and for another number of hops than the ranks have.
    """

    state_dtype: torch.dtype | None = None
    codec: Codec | str | None = field(default=None, kw_only=True)
    codec_inside: Codec | str | None = field(default=SAME, kw_only=True)
    codec_of_hops: tuple[Codec | str | None, ...] | None = field(default=None, kw_only=True)

    name: ClassVar[str]
    """What users call it; see docs/exchange.md."""
    tells_links_apart: ClassVar[bool] = False
    """Whether links inside a node may have a codec of their own."""
    is_chain: ClassVar[bool] = False
    """Whether states go from rank to next rank, so that each of these links may have a codec of its own."""

    def __post_init__(self) -> None:
        check_state_dtype(self.state_dtype)
        object.__setattr__(self, "codec", codec_named(self.codec))
        inside = self.codec if self.codec_inside == SAME else codec_named(self.codec_inside)
        object.__setattr__(self, "codec_inside", inside)
        if inside != self.codec and not self.tells_links_apart:
            raise InputError(
                f"{type(self).__name__} takes no codec_inside: all its links carry one format; got {described(inside)} beside the "
                f"codec {described(self.codec)}. Leave it out, or take TwoLevel, Ring, Pipelined or Neighbour"
            )
        if self.codec_of_hops is not None:
            self._take_codecs_of_hops(self.codec_of_hops)
        if self.state_dtype is not None and (self.codec or inside) is not None:
            raise InputError(
                f"{type(self).__name__} takes a state_dtype or a codec for states on the wire, and got both {self.state_dtype} and "
                f"{self.codec or inside}. Leave one of them out"
            )

    def _take_codecs_of_hops(self, given: object) -> None:
        name = type(self).__name__
        if not self.is_chain:
            raise InputError(
                f"{name} takes no codec_of_hops: its states go from every rank to others in one format. Give it a codec, or take "
                "Ring, Pipelined or Neighbour"
            )
        if not isinstance(given, tuple | list):
            raise InputError(
                f"{name}: codec_of_hops must hold a codec, its name or None for each hop from rank to next rank; got "
                f"{described(given)}. Give (None, 'int8', None) to code what goes over the second of three"
            )
        one_for_all = (self.state_dtype, self.codec, self.codec_inside)
        if any(each is not None for each in one_for_all):
            raise InputError(
                f"{name} takes codec_of_hops or one way for all of them, and got both {given} and "
                f"{next(each for each in one_for_all if each is not None)}. Leave one of them out"
            )
        object.__setattr__(self, "codec_of_hops", tuple(codec_named(codec) for codec in given))

    def check_num_hops(self, num_ranks: int) -> None:
        """Raise InputError for another number of codecs of hops than `num_ranks` ranks have hops."""
        if self.codec_of_hops is not None and len(self.codec_of_hops) != num_ranks - 1:
            raise InputError(
                f"{type(self).__name__}: codec_of_hops has {len(self.codec_of_hops)} entries for the {num_ranks - 1} hops between "
                f"{num_ranks} ranks. Give one for each, None where states go as they are"
            )

    @property
    def wires_of_hops(self) -> tuple[WireFormat | None, ...] | None:
        """How states travel over each hop; None where hops have no codecs of their own."""
        if self.codec_of_hops is None:
            return None
        return tuple(codec.format if isinstance(codec, Codec) else None for codec in self.codec_of_hops)

    @property
    def label(self) -> str:
        """Its name, and its codec, if any."""
        codecs = dict.fromkeys(codec.format.name for codec in self._codecs)
        return f"{self.name} {' and '.join(codecs)}" if codecs else self.name

    @property
    def _codecs(self) -> list[Codec]:
        codecs = (self.codec, self.codec_inside, *(self.codec_of_hops or ()))
        return [codec for codec in codecs if isinstance(codec, Codec)]

    def wire(self, phase: str, inside: bool = False) -> Wire:
        """How states travel in one direction of an exchange: between nodes, or everywhere; or inside a node."""
        codec = self.codec_inside if inside else self.codec
        assert codec is None or isinstance(codec, Codec)
        return Wire(self.state_dtype, codec, phase, "inside a node" if inside else "between nodes")

    @property
    def remembers_errors(self) -> bool:
        return any(codec.remembers_errors for codec in self._codecs)

    def for_another_layer(self) -> Topology:
        return self._with(lambda codec: codec.for_another_layer())

    def remembering_nothing(self) -> Topology:
        return self._with(lambda codec: codec.remembering_nothing())

    def _with(self, change: Callable[[Codec], Codec]) -> Topology:
        """The same topology with other codecs."""
        codec = change(self.codec) if isinstance(self.codec, Codec) else None
        inside = codec
        if self.codec_inside is not self.codec:
            inside = change(self.codec_inside) if isinstance(self.codec_inside, Codec) else None
        hops = self.codec_of_hops
        if hops is not None:
            hops = tuple(change(each) if isinstance(each, Codec) else None for each in hops)
        return replace(self, codec=codec, codec_inside=inside, codec_of_hops=hops)

    def serves(self, pair: Pair, layout: SequenceLayout, cluster: Cluster) -> bool:
        """Whether a choice may take it: whether it can carry this exchange out, and is meant for such a cluster.

        Called on every rank alike; sends nothing, unless `cluster` has several nodes.
        """
        return True

    def settled(self, problem: Problem, cluster: Cluster) -> Topology:
        """The same topology, with the options that were left open set to what costs least."""
        return self

    def resolve(self, pair: Pair, layout: SequenceLayout) -> Carrier:
        self.check_num_hops(layout.num_ranks)
        for codec in self._codecs:
            check_states_to_code(codec, pair)
        return self.carrier(pair, layout)

    def carrier(self, pair: Pair, layout: SequenceLayout) -> Carrier:
        """`resolve`, once states are known to be fit for the codec."""
        assert isinstance(self, Carrier)
        return self

    def modelled(self, pair: Pair, layout: SequenceLayout) -> tuple[Cost, Cluster]:
        cluster = stated_cluster_of(layout, pair.state.device.type)
        return self.cost(problem_of(pair, layout, self.state_dtype), cluster), cluster

    def on_wire(self, problem: Problem, inside: bool = False) -> Problem:
        """The problem with states as they travel: between nodes, or everywhere; or inside a node."""
        codec = self.codec_inside if inside else self.codec
        return replace(problem, wire=codec.format if isinstance(codec, Codec) else None)

    def cost(self, problem: Problem, cluster: Cluster) -> Cost:
        """What one exchange costs by the model.

        Args:
            problem: sizes. Its ranks are the cluster's.
            cluster: machines.

        Raises:
            InputError: where problem and cluster, or codecs of hops, are of different numbers of ranks.
        """
        if problem.num_ranks != cluster.num_ranks:
            raise InputError(
                f"the problem has {problem.num_ranks} ranks and the cluster {cluster.num_ranks}: take "
                "cluster.with_ranks(problem.num_ranks), or measure the group in question"
            )
        self.check_num_hops(problem.num_ranks)
        problem = self.on_wire(problem)
        forward, backward = (self.direction_cost(problem, cluster, backward) for backward in (False, True))
        return Cost(self.name, forward, backward)

    @abstractmethod
    def direction_cost(self, problem: Problem, cluster: Cluster, backward: bool) -> DirectionCost:
        """The cost of one direction; every option is settled, or taken as `settled` would. problem: with states `on_wire`."""


def check_states_to_code(codec: Codec | None, pair: Pair) -> None:
    """Raise InputError for states that a codec does not take; None is those that keep to a `max_relative_error`."""
    if pair.state.dtype != torch.float32:
        given, asked = (
            ("max_relative_error",) * 2 if codec is None else ("the codec", f"the codec {codec.format.name!r}")
        )
        raise InputError(
            f"{asked} takes states of torch.float32; got {pair.state.dtype}, those of an operator whose inputs are "
            f"{pair.state.dtype}. Leave {given} out, or compute in float32"
        )


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
