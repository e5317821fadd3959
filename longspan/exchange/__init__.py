"""How the states of all segments reach the segments after them."""

from longspan.comm.traffic import Traffic, record_traffic
from longspan.errors import InputError
from longspan.exchange.auto.calibration import measured_links
from longspan.exchange.auto.choice import Auto
from longspan.exchange.auto.order import measured_rank_order
from longspan.exchange.autograd import PendingExchange, start_exchange
from longspan.exchange.codec import CODECS, BFloat16, Codec, ErrorFeedback, Float8, Int8, TopK
from longspan.exchange.recomputation import keeping_exchanges, keeping_states
from longspan.exchange.topologies.all_gather import AllGather
from longspan.exchange.topologies.all_to_all import AllToAll
from longspan.exchange.topologies.listed import TOPOLOGIES
from longspan.exchange.topologies.neighbour import Neighbour
from longspan.exchange.topologies.pipelined import Pipelined
from longspan.exchange.topologies.ring import Ring
from longspan.exchange.topologies.two_level import TwoLevel
from longspan.exchange.topology import Arrived, Carrier, Exchanger, Handle, Priced, ReverseHandle, Topology, by_cost


def exchange_named(exchange: str | Exchanger) -> Exchanger:
    """What an operator's `exchange` asks for: a name stands for the topology, or for `Auto`, with its options left alone.

    Raises:
        InputError: for a name that does not exist, or a value of another type.
    """
    if isinstance(exchange, Exchanger):
        return exchange
    if exchange == "auto":
        return Auto()
    name: object = exchange
    if not isinstance(name, str) or name not in TOPOLOGIES:
        known = ", ".join(map(repr, TOPOLOGIES))
        raise InputError(
            f"exchange must be 'auto', one of {known}, or a topology with options such as longspan.exchange.Ring(state_dtype=...); "
            f"got {name!r}. Leave it out for 'auto'"
        )
    return TOPOLOGIES[name]()


__all__ = [
    "CODECS",
    "TOPOLOGIES",
    "AllGather",
    "AllToAll",
    "Arrived",
    "Auto",
    "BFloat16",
    "Carrier",
    "Codec",
    "ErrorFeedback",
    "Exchanger",
    "Float8",
    "Handle",
    "Int8",
    "Neighbour",
    "PendingExchange",
    "Pipelined",
    "Priced",
    "ReverseHandle",
    "Ring",
    "TopK",
    "Topology",
    "Traffic",
    "TwoLevel",
    "by_cost",
    "exchange_named",
    "keeping_exchanges",
    "keeping_states",
    "measured_links",
    "measured_rank_order",
    "record_traffic",
    "start_exchange",
]
