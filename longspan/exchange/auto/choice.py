"""The cheapest topology for each exchange, by the cost model: of stated figures, or of measured ones and a trial.

The choice depends on the sizes of states and transitions, the number of ranks, the nodes they stand on, how far documents reach,
and on the figures, which are the same on every rank: all ranks choose alike. By stated figures, two runs choose alike, too.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.comm.groups import kept
from longspan.errors import InputError
from longspan.exchange.auto.figures import figures_of, sizes_of
from longspan.exchange.auto.trial import Candidate, try_out
from longspan.exchange.problem import problem_of, stated_cluster_of
from longspan.exchange.topologies.listed import TOPOLOGIES
from longspan.exchange.topology import Carrier, Exchanger, Priced, by_cost, check_state_dtype
from longspan.layout import SequenceLayout, group_of
from longspan.modes import built_for_every_mode
from longspan.plan import Cluster, Cost
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
            digits.

    Raises:
        InputError: for a value out of range.
    """

    state_dtype: torch.dtype | None = None
    cluster: Cluster | None = None
    measure: bool = False

    def __post_init__(self) -> None:
        check_state_dtype(self.state_dtype)
        if self.measure and self.cluster is not None:
            raise InputError(
                "Auto takes figures of the machines or measures them, and got both a cluster and measure=True: leave one out"
            )

    def resolve(self, pair: Pair, layout: SequenceLayout) -> Carrier:
        return self.choose(pair, layout).topology.resolve(pair, layout)

    def modelled(self, pair: Pair, layout: SequenceLayout) -> tuple[Cost, Cluster]:
        return self.choose(pair, layout).cost, self._cluster(layout, pair.state)

    def choose(self, pair: Pair, layout: SequenceLayout) -> Priced:
        """The topology that is taken, with its modelled cost; see `Carrier.start` for the arguments.

        Raises:
            InputError: as `priced`.
        """
        priced = self.priced(pair, layout)
        # Nothing to try where no state passes from rank to rank: every document ends where its rank does.
        if not self.measure or priced[0].seconds == 0.0:
            return priced[0]
        # What documents change is known to the model: one trial does for all of them.
        figures = figures_of(layout, pair.state.device)
        sizes = sizes_of(problem_of(pair, layout, self.state_dtype))
        if sizes not in figures.errors:
            figures.errors[sizes] = built_for_every_mode(lambda: _errors(priced, pair, layout))
        errors = figures.errors[sizes]
        taken = min(priced, key=lambda each: each.seconds * errors.get(each.topology.name, 1.0))
        figures.taken[sizes] = taken.topology.name
        return taken

    def priced(self, pair: Pair, layout: SequenceLayout) -> list[Priced]:
        """What each topology that serves would cost by the model, cheapest first; arguments as in `Carrier.start`.

        Raises:
            InputError: if the given cluster has another number of ranks than the layout.
        """
        cluster = self._cluster(layout, pair.state)
        problem = problem_of(pair, layout, self.state_dtype)
        topologies = [kind(self.state_dtype) for kind in TOPOLOGIES.values()]
        serving = [topology for topology in topologies if topology.serves(pair, layout, cluster)]

        def price() -> list[Priced]:
            priced = by_cost(serving, problem, cluster)
            if layout.rank == 0:
                listed = ", ".join(f"{each.topology.name} {each.seconds * 1e3:.2f} ms" for each in priced)
                _log.info(
                    "exchange of states %s of %s: %s", tuple(pair.state.shape), type(pair.transition).__name__, listed
                )
            return priced

        return kept(group_of(layout), ("priced", cluster, problem, tuple(serving)), price)

    def _cluster(self, layout: SequenceLayout, state: Tensor) -> Cluster:
        if self.measure:
            return figures_of(layout, state.device).cluster
        return self.cluster or stated_cluster_of(layout, state.device.type)


def _errors(priced: list[Priced], pair: Pair, layout: SequenceLayout) -> dict[str, float]:
    """For each topology that was tried, the time of an exchange as a multiple of the modelled one."""
    candidates = [Candidate(each.topology.name, each.topology.resolve(pair, layout), each.seconds) for each in priced]
    tried = {
        each.topology.name: (seconds, each.seconds)
        for each, seconds in zip(priced, try_out(candidates, pair, layout), strict=True)
        if seconds is not None
    }
    if layout.rank == 0:
        listed = ", ".join(f"{name} {seconds * 1e3:.2f} ms" for name, (seconds, _) in tried.items())
        _log.info("tried: %s", listed)
    return {name: seconds / modelled for name, (seconds, modelled) in tried.items()}
