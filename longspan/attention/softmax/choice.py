"""Which method `method="auto"` takes: the cheapest by the cost model, of those that serve.

Each method's file has its formula and says what it serves; the figures of the machines are those of the exchange of states
(`longspan.plan.stated_cluster`). Decided from shapes and the layout alone, so that every rank decides the same without asking.

Operations of a pair of a query and a key: 4 · D per query head forward, 10 · D backward (two and five matrix products), D the
larger of the head dimensions of keys and of values. The busiest rank counts. A collective hides behind the blocks that need nothing
of it.
"""

from __future__ import annotations

from longspan.attention.softmax.all_gather import AllGatherKeys
from longspan.attention.softmax.ring import RingKeys
from longspan.attention.softmax.shapes import Shapes
from longspan.attention.softmax.ulysses import Ulysses
from longspan.exchange.problem import stated_cluster_of
from longspan.layout import SequenceLayout
from longspan.layout.visibility import Visibility
from longspan.plan import Cluster

METHODS: dict[str, type[AllGatherKeys | Ulysses | RingKeys]] = {
    "all_gather": AllGatherKeys,
    "ulysses": Ulysses,
    "ring": RingKeys,
}
"""The code of each method, by name: a new one is a file beside these and a line here."""

WORTHWHILE = 0.95
"""A method is taken before an earlier one of the list if it costs less than this part of it."""


def choose(layout: SequenceLayout, visibility: Visibility, shapes: Shapes, device_type: str) -> str:
    """The method for a layer; one rank, or ranks that need nothing of each other, take any."""
    cluster = stated_cluster_of(layout, device_type)
    return layout.cached(
        ("softmax_choice", visibility, shapes, cluster), lambda: _choose(layout, visibility, shapes, cluster)
    )


def _choose(layout: SequenceLayout, visibility: Visibility, shapes: Shapes, cluster: Cluster) -> str:
    best, lowest = "", float("inf")
    for name, method in METHODS.items():
        if method.serves(layout, visibility, shapes):
            seconds = method.seconds(layout, visibility, shapes, cluster)
            if seconds < WORTHWHILE * lowest:
                best, lowest = name, seconds
    return best
