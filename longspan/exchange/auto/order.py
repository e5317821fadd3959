"""In which order ranks hold a sequence so that a chain of states passes them fastest, by links that are measured now."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal

import torch

from longspan.exchange.auto.calibration import measured_links, ranks_per_node_of
from longspan.layout import SequenceLayout
from longspan.plan import LinkMatrix, chain_order

_log = logging.getLogger("longspan")

RankOrderOption = Sequence[int] | Literal["measured"]
"""What a user says of the order of ranks: each of them once, or that their links are measured."""

STATE_BYTES = 2**20
"""Of a layer's states where nobody says: 16 heads of 128 x 128 in float32."""
# Measured links differ from each other by some hundredths where they are alike: so much less must another order take.
_GAIN = 0.9


def measured_rank_order(
    layout: SequenceLayout, device: torch.device | str = "cpu", num_bytes: float = STATE_BYTES
) -> tuple[int, ...]:
    """The order of a layout's ranks in which a chain of states passes them fastest, as `SequenceLayout` takes `rank_order`.

    Their links are measured pair by pair (`measured_links`), and known to ``Auto(measure=True)`` from then on. Ranks of a node stay
    together, as `longspan.plan.chain_order` has it: nodes are those of the layout, or hosts. The order of their numbers stays
    unless another one takes at least a tenth less.

    Args:
        layout: of two ranks or more; its tokens do not matter.
        device: where the ranks' states are.
        num_bytes: of a layer's states.

    Collective: every rank of the group calls this, in the same order among its exchanges; all have the same result.
    """
    links = measured_links(layout, device)
    order = order_by(links, ranks_per_node_of(layout), num_bytes)
    if layout.rank == 0:
        _log.info("ranks in the order of their links: %s", order)
    return order


def order_by(links: LinkMatrix, ranks_per_node: int, num_bytes: float) -> tuple[int, ...]:
    """The order that `measured_rank_order` takes for measured links."""
    given = tuple(range(links.num_ranks))
    # A single node is the same as none.
    nodes = ranks_per_node if ranks_per_node < links.num_ranks else 1
    order = chain_order(links, num_bytes, nodes)
    return order if links.chain_seconds(order, num_bytes) <= _GAIN * links.chain_seconds(given, num_bytes) else given
