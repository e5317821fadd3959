"""How a chain's states travel over each hop by itself, where the links between ranks are known one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from longspan.exchange.codec import Codec
from longspan.plan import Cluster, Problem


def cheapest_codecs(problem: Problem, cluster: Cluster, codecs: Sequence[Codec | None]) -> tuple[Codec | None, ...]:
    """For each hop the one of `codecs` by which a state gets over it first; None sends it as it is. Of equals the first named.

    problem: with states as they are. cluster: with its links in the order in which ranks hold the sequence, the same on every rank:
    so both ends of a hop come to the same codec.
    """

    def seconds(place: int, codec: Codec | None) -> float:
        on_wire = replace(problem, wire=None if codec is None else codec.format)
        coding = cluster.coding(on_wire.coding_size(on_wire.num_rows), at_once=False)
        return cluster.hop_seconds(place, on_wire.state) + coding

    def cheapest(place: int) -> Codec | None:
        return min(codecs, key=lambda codec: seconds(place, codec))

    return tuple(cheapest(place) for place in range(cluster.num_ranks - 1))
