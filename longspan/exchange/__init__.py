"""Exchange topologies, one a file: how the states of all segments reach the segments after them."""

from longspan.errors import InputError
from longspan.exchange.all_gather import AllGather
from longspan.exchange.autograd import PendingExchange, start_exchange
from longspan.exchange.base import Arrived, Handle, ReverseHandle, Topology
from longspan.exchange.traffic import Traffic, record_traffic

TOPOLOGIES: dict[str, Topology] = {topology.name: topology for topology in (AllGather(),)}


def resolve_topology(name: str) -> Topology:
    """The topology of a name; ``"auto"`` is LASP-2's all_gather. Raises InputError for a name that does not exist."""
    if name == "auto":
        return TOPOLOGIES["all_gather"]
    if name not in TOPOLOGIES:
        raise InputError(f"exchange must be 'auto' or one of {', '.join(map(repr, TOPOLOGIES))}; got {name!r}")
    return TOPOLOGIES[name]


__all__ = [
    "TOPOLOGIES",
    "AllGather",
    "Arrived",
    "Handle",
    "PendingExchange",
    "ReverseHandle",
    "Topology",
    "Traffic",
    "record_traffic",
    "resolve_topology",
    "start_exchange",
]
