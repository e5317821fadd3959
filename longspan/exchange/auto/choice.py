"""The cheapest topology for each exchange: by the cost model of `longspan.plan` with figures measured once per process group, and a
trial of those that the model finds close, once for each size of states.

The choice depends on the sizes of states and transitions, the number of ranks, the nodes they stand on, how far documents reach,
and on what was measured, which is the same on every rank: all ranks choose alike. A run on other machines, or on busier ones, may
choose otherwise; name a topology where that must not be.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import torch

from longspan.comm.groups import kept
from longspan.comm.hosts import nodes_of
from longspan.errors import LayoutError
from longspan.exchange.auto.calibration import measured_cluster
from longspan.exchange.auto.trial import Candidate, try_out
from longspan.exchange.topologies.all_gather import AllGather
from longspan.exchange.topologies.all_to_all import AllToAll
from longspan.exchange.topologies.neighbour import Neighbour, only_neighbours_meet
from longspan.exchange.topologies.pipelined import Pipelined
from longspan.exchange.topologies.ring import Ring
from longspan.exchange.topologies.two_level import TwoLevel
from longspan.exchange.topology import Topology, Unresolved
from longspan.layout import SequenceLayout, group_of
from longspan.plan import PLANNED, Cluster, Cost, Problem, by_cost
from longspan.state import Pair

_log = logging.getLogger("longspan")


@dataclass(frozen=True)
class Auto(Unresolved):
    """Takes the topology that costs least, forward and backward together.

    state_dtype: states and their gradients are rounded to it for the wire; None sends them as they are.
    cluster: figures of the machines, by which alone the model then chooses; None measures them at the first exchange of a process
        group, in a fraction of a second, and tries the topologies that are close.
    """

    name = "auto"
    state_dtype: torch.dtype | None = None
    cluster: Cluster | None = None

    def resolve(self, pair: Pair, layout: SequenceLayout) -> Topology:
        return self._topology(self.choose(pair, layout)).resolve(pair, layout)

    def choose(self, pair: Pair, layout: SequenceLayout) -> Cost:
        """The cost, as modelled, of the topology that is taken; see `Topology.start` for the arguments.

        Raises:
            InputError: as `costs`.
        """
        costs = self.costs(pair, layout)
        # Nothing to try where no state passes from rank to rank: every document ends where its rank does.
        if self.cluster is not None or costs[0].seconds == 0.0:
            return costs[0]
        # What documents change is known to the model: one trial does for all of them.
        sizes = replace(self._problem(pair, layout), longest_chain=None)
        key = ("errors", pair.state.device.type, layout.ranks_per_node, sizes)
        errors: dict[str, float] = kept(group_of(layout), key, lambda: self._errors(costs, pair, layout))
        return min(costs, key=lambda cost: cost.seconds * errors.get(cost.topology, 1.0))

    def _errors(self, costs: list[Cost], pair: Pair, layout: SequenceLayout) -> dict[str, float]:
        """How many times as long as modelled an exchange takes, for the topologies that were tried."""
        candidates = [Candidate(self._topology(cost).resolve(pair, layout), cost.seconds) for cost in costs]
        tried = {
            cost.topology: (seconds, cost.seconds)
            for cost, seconds in zip(costs, try_out(candidates, pair, layout), strict=True)
            if seconds is not None
        }
        if layout.rank == 0:
            listed = ", ".join(f"{name} {seconds * 1e3:.2f} ms" for name, (seconds, _) in tried.items())
            _log.info("tried: %s", listed)
        return {name: seconds / modelled for name, (seconds, modelled) in tried.items()}

    def costs(self, pair: Pair, layout: SequenceLayout) -> list[Cost]:
        """What each topology that can carry the exchange out would cost by the model, cheapest first; see `Topology.start` for the
        arguments.

        Raises:
            InputError: if the given cluster has another number of ranks than the layout.
        """
        device, problem = pair.state.device, self._problem(pair, layout)
        reaches_no_further = only_neighbours_meet(pair, layout)
        key = ("costs", self.cluster, device.type, layout.ranks_per_node, problem, reaches_no_further)

        def rank_topologies() -> list[Cost]:
            cluster = self.cluster or measured_cluster(layout, device)
            excluded = set() if reaches_no_further else {"neighbour"}
            if not _has_two_levels(layout, cluster):
                excluded.add("two_level")
            costs = by_cost(problem, cluster, [name for name in PLANNED if name not in excluded])
            if layout.rank == 0:
                listed = ", ".join(f"{cost.topology} {cost.seconds * 1e3:.2f} ms" for cost in costs)
                _log.info(
                    "exchange of states %s of %s: %s", tuple(pair.state.shape), type(pair.transition).__name__, listed
                )
            return costs

        return kept(group_of(layout), key, rank_topologies)

    def _problem(self, pair: Pair, layout: SequenceLayout) -> Problem:
        dtype = pair.state.dtype
        return Problem.of_states(
            type(pair.transition), pair.state.shape, layout, dtype.itemsize, (self.state_dtype or dtype).itemsize
        )

    def _topology(self, cost: Cost) -> Topology:
        if cost.topology == "pipelined":
            return Pipelined(self.state_dtype, cost.num_blocks)
        kinds = (AllGather, Ring, AllToAll, TwoLevel, Neighbour)
        return next(kind(self.state_dtype) for kind in kinds if kind.name == cost.topology)


def _has_two_levels(layout: SequenceLayout, cluster: Cluster) -> bool:
    """Whether there are several nodes of several ranks, and the layout's nodes are the cluster's."""
    if cluster.num_nodes == 1 or cluster.ranks_per_node == 1:
        return False
    try:
        return nodes_of(group_of(layout), layout.ranks_per_node).ranks_per_node == cluster.ranks_per_node
    except LayoutError:
        return False
