"""The chain that a topology's options ask for."""

from __future__ import annotations

from collections.abc import Sequence

from longspan.comm.hosts import nodes_of
from longspan.exchange.chain import Chain
from longspan.exchange.codec import Codec
from longspan.exchange.topology import Topology
from longspan.layout import SequenceLayout, group_of


def chain_for(
    topology: Topology, layout: SequenceLayout, num_blocks: int = 1, cuts: tuple[bool, ...] | None = None
) -> Chain:
    """A chain over a layout's ranks, with the topology's codecs, which fit it; the other arguments are those of `Chain`.

    Where links inside a node have another codec than links between nodes, and the layout says nothing of nodes, the hosts' names
    are asked for, once per process group.

    Raises:
        LayoutError: on every rank, where hosts make no nodes, and the codecs differ.
    """
    if topology.codec_of_hops is not None:
        codecs = _codecs_of_this_rank(topology.codec_of_hops, layout)
        return Chain(topology.name, None, num_blocks, cuts, codec_to=codecs)
    codec, inside = topology.codec, topology.codec_inside
    assert codec is None or isinstance(codec, Codec)
    assert inside is None or isinstance(inside, Codec)
    ranks_per_node = 1
    if codec != inside:
        ranks_per_node = nodes_of(group_of(layout), layout.ranks_per_node).ranks_per_node
    return Chain(topology.name, topology.state_dtype, num_blocks, cuts, codec, inside, ranks_per_node)


def _codecs_of_this_rank(
    of_hops: Sequence[Codec | str | None], layout: SequenceLayout
) -> tuple[tuple[int, Codec | None], ...]:
    """The codecs of the hops to the ranks before and after this one, in the order in which ranks hold the sequence."""
    order = layout.rank_order
    place = order.index(layout.rank)
    hops = [(other, min(place, other)) for other in (place - 1, place + 1) if 0 <= other < len(order)]
    codecs = []
    for other, hop in hops:
        codec = of_hops[hop]
        assert codec is None or isinstance(codec, Codec)
        codecs.append((order[other], codec))
    return tuple(codecs)
