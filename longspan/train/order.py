"""In which order ranks hold each sequence: that of their numbers, a given one, or by links that are measured before the first step.

Ranks that share a sequence have one order; groups of them are measured at once, and have each their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from longspan.exchange.auto.calibration import known_links, take_links
from longspan.exchange.auto.order import STATE_BYTES, measured_rank_order
from longspan.layout import SequenceLayout
from longspan.models import LinearLlama3
from longspan.models.mixers import LayerMixer
from longspan.plan import LinkMatrix
from longspan.train.config import Config
from longspan.train.loading import SavedCheckpoint
from longspan.train.ranks import Ranks

_FLOAT32 = 4


@dataclass(frozen=True)
class RankOrder:
    """The order of each group of ranks that share a sequence, by their numbers in the group; None as they are numbered.

    links: of each group, as measured; empty where nothing was.
    """

    groups: tuple[tuple[int, ...] | None, ...]
    links: tuple[LinkMatrix, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """What `from_json` takes."""
        groups = [None if order is None else list(order) for order in self.groups]
        return {"groups": groups, "links": [links.as_json() for links in self.links]}

    @classmethod
    def from_json(cls, record: Any) -> RankOrder:
        """The order that `as_json` wrote; raises KeyError, TypeError or ValueError for another record."""
        groups = tuple(None if order is None else tuple(map(int, order)) for order in record["groups"])
        return cls(groups, tuple(LinkMatrix.from_json(links) for links in record["links"]))


def stated_order(config: Config, ranks: Ranks) -> RankOrder:
    """The order that the config itself says; that of the ranks' numbers where it is to be measured."""
    return RankOrder((config.parallel.given_rank_order,) * ranks.dp)


def measures_links(config: Config, ranks: Ranks) -> bool:
    """Whether the order follows from a measurement. Of two ranks one order is as fast as the other."""
    words = config.parallel.given_rank_order is None and config.parallel.rank_order != ("given",)
    return ranks.sp > 2 and words


def measured_order(model: LinearLlama3, layout: SequenceLayout, ranks: Ranks) -> RankOrder:
    """Measure the links of each group of ranks that share a sequence; the same on every rank, which all call this together.

    layout: of this rank's group.
    """
    own = measured_rank_order(layout, ranks.device, bytes_of_states(model))
    links = known_links(layout, ranks.device)
    assert links is not None
    everyone = ranks.gather_json({"groups": [list(own)], "links": [links.as_json()]})
    found = [RankOrder.from_json(everyone[members[0]]) for members in ranks.degrees.groups("sp")]
    return RankOrder(tuple(each.groups[0] for each in found), tuple(each.links[0] for each in found))


def bytes_of_states(model: LinearLlama3) -> int:
    """Bytes of the largest states that a layer exchanges for a row, as far as its mixers say."""
    footprints = [module.footprint() for module in model.modules() if isinstance(module, LayerMixer)]
    largest = max((found.state for found in footprints if found is not None), default=0)
    return _FLOAT32 * largest or STATE_BYTES


def order_of_checkpoint(saved: SavedCheckpoint, layout: SequenceLayout, ranks: Ranks) -> RankOrder | None:
    """The measured order of a checkpoint, if it has one of as many groups of as many ranks; its links are known from then on.

    Raises:
        CheckpointError: for an order of another form.
    """
    order = saved.measured("rank_order", RankOrder.from_json, "order of ranks")
    if order is None:
        return None
    everyone = list(range(ranks.sp))
    fits = all(own is not None and sorted(own) == everyone for own in order.groups)
    fits = fits and all(links.num_ranks == ranks.sp for links in order.links)
    if not fits or not len(order.groups) == len(order.links) == ranks.dp:
        return None
    take_links(layout, ranks.device, order.links[ranks.dp_rank])
    return order


def describe(order: RankOrder, ranks: Ranks, from_checkpoint: bool) -> str:
    """The order of each group of ranks in a line, and of which links it follows."""
    parts = [
        "as numbered" if own is None else " ".join(str(members[number]) for number in own)
        for own, members in zip(order.groups, ranks.degrees.groups("sp"), strict=True)
    ]
    said = f"ranks {'; '.join(dict.fromkeys(parts))}"
    if not any(order.groups) and not order.links:
        return f"{said}: nothing was measured, as of {ranks.sp} ranks either order is as fast"
    if not order.links:
        return f"{said}; as parallel.rank_order says"
    when = "before, as the checkpoint has them" if from_checkpoint else "now, and kept in the checkpoints"
    slowest = min(
        links.bandwidth[one][other]
        for links in order.links
        for one in range(links.num_ranks)
        for other in range(links.num_ranks)
        if one != other
    )
    return f"{said}; by links of {slowest / 1e6:,.1f} MB/s and more, measured {when}"
