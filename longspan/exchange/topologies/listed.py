"""The topologies by name: a new one is a file beside this one and a line here."""

from __future__ import annotations

from longspan.exchange.topologies.all_gather import AllGather
from longspan.exchange.topologies.all_to_all import AllToAll
from longspan.exchange.topologies.neighbour import Neighbour
from longspan.exchange.topologies.pipelined import Pipelined
from longspan.exchange.topologies.ring import Ring
from longspan.exchange.topologies.two_level import TwoLevel
from longspan.exchange.topology import Topology

TOPOLOGIES: dict[str, type[Topology]] = {
    topology.name: topology for topology in (AllGather, Ring, Pipelined, AllToAll, TwoLevel, Neighbour)
}
