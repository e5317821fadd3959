"""Exchange topologies, one a file: how the states of all segments reach the segments after them."""

import dataclasses
from typing import Any

from longspan.comm.traffic import Traffic, record_traffic
from longspan.errors import InputError
from longspan.exchange.auto.choice import Auto
from longspan.exchange.autograd import PendingExchange, start_exchange
from longspan.exchange.options import Exchange
from longspan.exchange.topologies.all_gather import AllGather
from longspan.exchange.topologies.all_to_all import AllToAll
from longspan.exchange.topologies.neighbour import Neighbour
from longspan.exchange.topologies.pipelined import Pipelined
from longspan.exchange.topologies.ring import Ring
from longspan.exchange.topologies.two_level import TwoLevel
from longspan.exchange.topology import Arrived, Handle, ReverseHandle, Topology

TOPOLOGIES: dict[str, Topology] = {
    topology.name: topology
    for topology in (
        AllGather(),
        Ring(),
        Pipelined(),
        Neighbour(),
        AllToAll(),
        TwoLevel(),
        Auto(),
    )
}


def resolve_topology(exchange: str | Exchange) -> Topology:
    """The topology that an operator's `exchange` asks for, with its options set.

    Raises:
        InputError: for a name that does not exist, or an option that the topology does not have.
    """
    options = {}
    name = exchange
    if isinstance(exchange, Exchange):
        name = exchange.topology
        # What stands at its default was not asked for.
        options = {
            field.name: getattr(exchange, field.name)
            for field in dataclasses.fields(exchange)
            if field.name != "topology" and getattr(exchange, field.name) != field.default
        }
    if not isinstance(name, str) or name not in TOPOLOGIES:
        known = ", ".join(repr(other) for other in TOPOLOGIES if other != "auto")
        raise InputError(
            f"exchange must be 'auto' or one of {known}, or a longspan.Exchange with one of these names; got {name!r}. Leave "
            "it out for 'auto'"
        )
    for option in options:
        takers = [other for other, topology in TOPOLOGIES.items() if option in _options(topology)]
        if name not in takers:
            raise InputError(
                f"the topology {name!r} has no option {option}; leave it out, or use one that has: "
                f"{', '.join(map(repr, takers))}"
            )
    chosen: Any = TOPOLOGIES[name]
    topology: Topology = dataclasses.replace(chosen, **options) if options else chosen
    return topology


def _options(topology: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(topology)] if dataclasses.is_dataclass(topology) else []


__all__ = [
    "TOPOLOGIES",
    "AllGather",
    "AllToAll",
    "Arrived",
    "Auto",
    "Exchange",
    "Handle",
    "Neighbour",
    "PendingExchange",
    "Pipelined",
    "ReverseHandle",
    "Ring",
    "Topology",
    "Traffic",
    "TwoLevel",
    "record_traffic",
    "resolve_topology",
    "start_exchange",
]
