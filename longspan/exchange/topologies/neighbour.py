"""Neighbours only: each state goes to the owner of the next segment and no further: one message, without a scan or a chain.

That is the whole exchange where no state survives a second segment on another rank:

- no document spans more than two ranks' segments; or
- every head forgets: the decay over each segment on the way is exactly zero in the dtype of the states (`retention`, Lightning
  Attention: ``exp(length · log γ) == 0``), which float32 reaches at ``length · log γ < −104``.

A rank sends the bytes and messages of `ring`: |U| numbers in one message for each of its segments that another rank's segment
follows, forward and backward, but all ranks at once. Where the exchange does not hold, it is refused before any message.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from longspan.errors import LayoutError
from longspan.exchange.chain import chain_of
from longspan.exchange.chain_cost import bytes_by_hop, chain_cost, messages_of_chain
from longspan.exchange.chained import chain_for
from longspan.exchange.topology import Carrier, Topology
from longspan.layout import SequenceLayout
from longspan.plan import Cluster, DirectionCost, Problem
from longspan.state import HeadDecay, Pair, Transition


@dataclass(frozen=True)
class Neighbour(Topology):
    """One send to the next segment's owner: for short documents, and for decays that forget within a segment.

    States are rounded or coded once.
    """

    name = "neighbour"
    tells_links_apart = True
    is_chain = True

    def serves(self, pair: Pair, layout: SequenceLayout, cluster: Cluster) -> bool:
        return only_neighbours_meet(pair, layout)

    def carrier(self, pair: Pair, layout: SequenceLayout) -> Carrier:
        if not only_neighbours_meet(pair, layout):
            raise LayoutError(
                "the exchange 'neighbour' holds where no document spans more than two ranks' segments, or where every head's "
                f"decay over a segment is zero in {pair.state.dtype}; neither is so for {type(pair.transition).__name__} "
                f"transitions of {layout.seq_len} tokens on {layout.num_ranks} ranks ({layout.order}). Use exchange='auto', which "
                "takes it where it holds, or 'all_to_all'"
            )
        return chain_for(self, layout, cuts=_cuts(pair.transition, layout))

    def direction_cost(self, problem: Problem, cluster: Cluster, backward: bool) -> DirectionCost:
        """One message per segment to the owner of the next, all at once, and no fold: for states that reach no further.

        seconds = latency + (n − 1) · gap + n · |U| / bandwidth, on the slower of the links inside and between nodes. For two
        segments it is the ring.
        """
        wires, inside = self.wires_of_hops, self.on_wire(problem, inside=True)
        if problem.num_segments == 2:
            return chain_cost(problem, cluster, 1, inside.wire, wires)
        messages = messages_of_chain(problem)
        if wires is not None:
            hops = [replace(problem, wire=wire) for wire in wires]
            seconds = (messages - 1) * cluster.slowest.gap + max(
                cluster.hop_seconds(place, messages * hop.state, at_once=True)
                + cluster.coding(hop.coding_size(hop.num_rows, messages, messages), at_once=True)
                for place, hop in enumerate(hops)
            )
            return DirectionCost(seconds, 0.0, bytes_by_hop(problem, 1, wires), messages, 1)
        seconds = cluster.to_next(messages * problem.state, messages, messages * inside.state)
        sizes = [each.coding_size(each.num_rows, messages, messages) for each in (problem, inside)]
        seconds += max(cluster.coding(size, at_once=True) for size in sizes)
        outermost = problem if cluster.num_nodes > 1 else inside
        return DirectionCost(seconds, 0.0, messages * outermost.state, messages, 1)


def only_neighbours_meet(pair: Pair, layout: SequenceLayout) -> bool:
    """Whether sending each state to the next segment alone is the whole exchange; the same answer on every rank.

    Decays are looked at where the host knows them: those of tensors on the CPU, and constants that were given as numbers.
    """
    if _is_independent(layout, None):
        return True
    cuts = _cuts(pair.transition, layout)
    return cuts is not None and _is_independent(layout, cuts)


def _is_independent(layout: SequenceLayout, cuts: tuple[bool, ...] | None) -> bool:
    def compute() -> bool:
        return all(run.is_independent or run.target is None for run in chain_of(layout, reverse=False, cuts=cuts))

    return layout.cached(("independent", cuts), compute)


def _cuts(transition: Transition, layout: SequenceLayout) -> tuple[bool, ...] | None:
    """For each segment in global order, whether nothing of what enters it leaves it; None: only where a document starts."""
    if not isinstance(transition, HeadDecay):
        return None
    forgets = _is_zero(transition, layout)
    segments = layout.all_segments
    return tuple(zero or segment.starts_document for zero, segment in zip(forgets, segments, strict=True))


def _is_zero(transition: HeadDecay, layout: SequenceLayout) -> list[bool]:
    """For each segment in global order, whether the host knows that nothing passes through it."""
    parameter = transition.parameter
    if parameter.device.type != "cpu":
        if transition.log_decay is None:
            return [False] * len(layout.all_segments)
        lengths = torch.tensor([segment.num_tokens for segment in layout.all_segments], dtype=parameter.dtype)
        parameter = lengths[:, None] * torch.tensor(transition.log_decay, dtype=parameter.dtype)
    zero: list[bool] = (parameter.exp() == 0).all(dim=1).tolist()
    return zero
