"""What was measured of a process group, kept as long as the group, and written down to be taken again by another run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from longspan import state
from longspan.comm.groups import keep, kept, peek
from longspan.errors import InputError
from longspan.exchange.auto.calibration import measured_cluster, ranks_per_node_of
from longspan.layout import SequenceLayout, group_of
from longspan.plan import Cluster, Link, LinkMatrix, Problem

Tried = tuple[Problem, str]
"""What one trial is of: sizes of states, and in what they travel (`longspan.exchange.Auto.on_wire`)."""


@dataclass
class Figures:
    """The measured cluster, and for each size of states, and what they travel in, what its trial found.

    errors: for each topology that was tried, its time as a multiple of the modelled one. taken: the topology that was last taken.
    """

    cluster: Cluster
    errors: dict[Tried, dict[str, float]] = field(default_factory=dict)
    taken: dict[Tried, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Numbers, strings and lists, from which `from_json` makes the same figures."""
        trials = [
            {
                "problem": vars(sizes) | {"transition": sizes.transition.__name__},
                "on_wire": on_wire,
                "errors": errors,
                "taken": self.taken.get((sizes, on_wire)),
            }
            for (sizes, on_wire), errors in self.errors.items()
        ]
        return {"cluster": asdict(self.cluster), "trials": trials}

    def fit(self, layout: SequenceLayout) -> bool:
        """Whether they are of as many ranks as the layout has, on such nodes."""
        here = (layout.num_ranks, ranks_per_node_of(layout))
        return here == (self.cluster.num_ranks, self.cluster.ranks_per_node)

    @classmethod
    def from_json(cls, record: Any) -> Figures:
        """The figures that `as_json` wrote.

        Raises:
            InputError: for a record of another form.
        """
        try:
            values = dict(record["cluster"])
            for name in ("intra", "inter", "gather", "swap"):
                if values[name] is not None:
                    values[name] = Link(**values[name])
            if values.get("links") is not None:
                values["links"] = LinkMatrix.from_json(values["links"])
            figures = cls(Cluster(**values))
            for entry in record["trials"]:
                sizes = dict(entry["problem"])
                sizes["transition"] = getattr(state, sizes["transition"])
                # Of figures that were written before there were codecs: as they are.
                tried = Problem(**sizes), str(entry.get("on_wire", ""))
                figures.errors[tried] = {str(name): float(error) for name, error in entry["errors"].items()}
                if entry["taken"] is not None:
                    figures.taken[tried] = str(entry["taken"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"no figures of an exchange: {type(error).__name__}: {error}") from error
        return figures


def sizes_of(problem: Problem) -> Problem:
    """A problem without what documents change of it."""
    return replace(problem, longest_chain=None)


def figures_of(layout: SequenceLayout, device: torch.device) -> Figures:
    """The figures of a layout's process group; measured at the first call for its group and nodes, equal on all ranks.

    The first call is collective: every rank of the group makes it, in the same order among its exchanges.
    """
    ranks_per_node = ranks_per_node_of(layout)
    return kept(
        group_of(layout),
        _key(device, ranks_per_node),
        lambda: Figures(measured_cluster(layout, device, ranks_per_node)),
    )


def known_figures(layout: SequenceLayout, device: torch.device) -> Figures | None:
    """The figures of a layout's process group if it has been measured, or has taken them; measures nothing."""
    key = _key(device, ranks_per_node_of(layout))
    figures: Figures | None = peek(group_of(layout), key)
    return figures


def take_figures(layout: SequenceLayout, device: torch.device, figures: Figures) -> None:
    """Give a process group `figures`, so that it measures none, or in place of those it measured; every rank gives the same.

    Raises:
        InputError: for figures of another number of ranks or nodes.
    """
    here = (layout.num_ranks, ranks_per_node_of(layout))
    there = (figures.cluster.num_ranks, figures.cluster.ranks_per_node)
    if not figures.fit(layout):
        raise InputError(
            f"the figures are of {there[0]} ranks on nodes of {there[1]}, and the layout has {here[0]} on nodes of {here[1]}"
        )
    keep(group_of(layout), _key(device, here[1]), figures)


def _key(device: torch.device, ranks_per_node: int) -> tuple[str, str, int]:
    return ("figures", device.type, ranks_per_node)
