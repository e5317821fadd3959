"""The cheapest topology for each exchange, by the cost model: of stated figures, or of measured ones and a trial.

The choice depends on the sizes of states and transitions, the number of ranks, the nodes they stand on, how far documents reach,
and on the figures, which are the same on every rank: all ranks choose alike. By stated figures, two runs choose alike, too.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longspan.comm.groups import kept
from longspan.errors import InputError
from longspan.exchange.auto.calibration import known_links
from longspan.exchange.auto.figures import figures_of, sizes_of
from longspan.exchange.auto.hops import cheapest_codecs
from longspan.exchange.auto.trial import Candidate, try_out
from longspan.exchange.codec import Codec, codec_named, codecs_within
from longspan.exchange.problem import problem_of, stated_cluster_of
from longspan.exchange.topologies.listed import TOPOLOGIES
from longspan.exchange.topology import (
    Carrier,
    Exchanger,
    Priced,
    Topology,
    by_cost,
    check_state_dtype,
    check_states_to_code,
)
from longspan.layout import SequenceLayout, group_of
from longspan.modes import built_for_every_mode
from longspan.plan import Cluster, Cost, Problem
from longspan.state import Pair

_log = logging.getLogger("longspan")


@dataclass(frozen=True)
class Auto(Exchanger):
    """Takes the topology that costs least, forward and backward together.

    Args:
        state_dtype: as in `Topology`.
        cluster: figures of the machines; None is `longspan.plan.stated_cluster` for the kind of device. A layout that was told of
            no nodes (`ranks_per_node`, or a mesh of nodes and ranks) is taken to be on one.
        measure: measure the figures at the first exchange of a process group, in a fraction of a second, and try the topologies
            that are close, once for each size of states. Another run may then choose otherwise, and its sums differ in their last
            digits. Links that were measured pair by pair before (`measured_links`) are counted one by one.

        max_relative_error: the error that one passage between ranks may make of a head's state, ‖error‖ / ‖state‖; what keeps to it
            (bfloat16, the codecs of `longspan.exchange.codec`) is chosen with the topology where it costs less, for links inside
            nodes and between them apart, and in a chain for each link by itself where the cluster has a matrix of them. None sends
            states as they are.
        codec: as in `Topology`, for whichever topology is taken.

    Raises:
        InputError: for a value out of range, for more than one of state_dtype, codec and max_relative_error, and for an error that
            no codec keeps to; at the exchange, for codecs with float64 states.
    """

    state_dtype: torch.dtype | None = None
    cluster: Cluster | None = None
    measure: bool = False
    max_relative_error: float | None = None
    codec: Codec | str | None = None

    def __post_init__(self) -> None:
        check_state_dtype(self.state_dtype)
        object.__setattr__(self, "codec", codec_named(self.codec))
        given = {
            name: value
            for name in ("state_dtype", "codec", "max_relative_error")
            if (value := getattr(self, name)) is not None
        }
        if len(given) > 1:
            raise InputError(
                "Auto is told how states travel by one of state_dtype, codec and max_relative_error; got "
                f"{given}. Leave out all but one"
            )
        if self.max_relative_error is not None:
            codecs_within(self.max_relative_error)
        if self.measure and self.cluster is not None:
            raise InputError(
                "Auto takes figures of the machines or measures them, and got both a cluster and measure=True: leave one out"
            )

    def resolve(self, pair: Pair, layout: SequenceLayout) -> Carrier:
        return self.choose(pair, layout).topology.resolve(pair, layout)

    @property
    def remembers_errors(self) -> bool:
        return isinstance(self.codec, Codec) and self.codec.remembers_errors

    @property
    def on_wire(self) -> str:
        """What it was told of codecs, in words; empty where nothing. A trial of other ways over the wire says nothing of these."""
        if self.max_relative_error is not None:
            return f"an error of at most {self.max_relative_error}"
        if isinstance(self.codec, Codec):
            return f"{self.codec.format.name} within {self.codec.format.worst_error:.4g}"
        return ""

    def for_another_layer(self) -> Auto:
        return replace(self, codec=self.codec.for_another_layer() if isinstance(self.codec, Codec) else None)

    def remembering_nothing(self) -> Auto:
        return replace(self, codec=self.codec.remembering_nothing() if isinstance(self.codec, Codec) else None)

    def modelled(self, pair: Pair, layout: SequenceLayout) -> tuple[Cost, Cluster]:
        return self.choose(pair, layout).cost, self._cluster(layout, pair.state)

    def choose(self, pair: Pair, layout: SequenceLayout) -> Priced:
        """The topology that is taken, with its modelled cost; see `Carrier.start` for the arguments.

        Raises:
            InputError: as `priced`.
        """
        priced = self.priced(pair, layout)
        # One of each kind: how states travel is the model's to say.
        cheapest: dict[str, Priced] = {}
        for each in priced:
            cheapest.setdefault(each.topology.name, each)
        priced = list(cheapest.values())
        # Nothing to try where no state passes from rank to rank: every document ends where its rank does.
        if not self.measure or priced[0].seconds == 0.0:
            return priced[0]
        # What documents change is known to the model: one trial does for all of them.
        figures = figures_of(layout, pair.state.device)
        tried = sizes_of(problem_of(pair, layout, self.state_dtype)), self.on_wire
        if tried not in figures.errors:
            figures.errors[tried] = built_for_every_mode(lambda: _errors(priced, pair, layout))
        errors = figures.errors[tried]
        taken = min(priced, key=lambda each: each.seconds * errors.get(each.topology.label, 1.0))
        figures.taken[tried] = taken.topology.label
        return taken

    def priced(self, pair: Pair, layout: SequenceLayout) -> list[Priced]:
        """What each topology that serves would cost by the model, cheapest first; arguments as in `Carrier.start`.

        Raises:
            InputError: if the given cluster has another number of ranks than the layout; for states that no codec takes.
        """
        cluster = self._cluster(layout, pair.state)
        problem = problem_of(pair, layout, self.state_dtype)
        if self.codec is not None or self.max_relative_error is not None:
            check_states_to_code(self.codec if isinstance(self.codec, Codec) else None, pair)
        serving = [
            topology
            for kind in TOPOLOGIES.values()
            if kind(self.state_dtype).serves(pair, layout, cluster)
            for topology in self._ways(kind, problem, cluster)
        ]

        def price() -> list[Priced]:
            priced = by_cost(serving, problem, cluster)
            if layout.rank == 0:
                listed = ", ".join(f"{each.topology.label} {each.seconds * 1e3:.2f} ms" for each in priced)
                _log.info(
                    "exchange of states %s of %s: %s", tuple(pair.state.shape), type(pair.transition).__name__, listed
                )
            return priced

        return kept(group_of(layout), ("priced", cluster, problem, tuple(serving)), price)

    def _ways(self, kind: type[Topology], problem: Problem, cluster: Cluster) -> list[Topology]:
        """The topology with each way of states over the wire that may be chosen."""
        if self.max_relative_error is None:
            return [kind(self.state_dtype, codec=self.codec)]
        codecs = [None, *codecs_within(self.max_relative_error)]
        apart = kind.tells_links_apart and 1 < cluster.ranks_per_node < cluster.num_ranks
        ways: list[Topology] = [
            kind(codec=codec, codec_inside=inside) for codec in codecs for inside in (codecs if apart else [codec])
        ]
        if kind.is_chain and cluster.links is not None:
            hops = cheapest_codecs(problem, cluster, codecs)
            if len(set(hops)) > 1:
                ways.append(kind(codec_of_hops=hops))
        return ways

    def _cluster(self, layout: SequenceLayout, state: Tensor) -> Cluster:
        if not self.measure:
            cluster = self.cluster or stated_cluster_of(layout, state.device.type)
            return cluster.in_order(layout.rank_order)
        measured, links = figures_of(layout, state.device).cluster, known_links(layout, state.device)
        return measured if links is None else replace(measured, links=links.in_order(layout.rank_order))


def _errors(priced: list[Priced], pair: Pair, layout: SequenceLayout) -> dict[str, float]:
    """For each topology that was tried, the time of an exchange as a multiple of the modelled one."""
    candidates = [Candidate(each.topology.label, each.topology.resolve(pair, layout), each.seconds) for each in priced]
    tried = {
        each.topology.label: (seconds, each.seconds)
        for each, seconds in zip(priced, try_out(candidates, pair, layout), strict=True)
        if seconds is not None
    }
    if layout.rank == 0:
        listed = ", ".join(f"{name} {seconds * 1e3:.2f} ms" for name, (seconds, _) in tried.items())
        _log.info("tried: %s", listed)
    return {name: seconds / modelled for name, (seconds, modelled) in tried.items()}
