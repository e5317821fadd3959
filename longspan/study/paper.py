"""What LASP-2 (arXiv 2502.07563) found of the same mixers, and whether a study orders them alike.

Losses of Linear-Llama3-1B after 50 billion tokens of SlimPajama, in sequences of 16K tokens and batches of eight. With another
text, smaller models and far fewer tokens the order alone can be compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

from longspan.study.grid import ALL, RATIOS, REFERENCE
from longspan.study.results import Spread

Place = tuple[str, str]
"""Mixer and share of softmax layers."""

_SHARES = tuple(RATIOS)

TABLES: dict[str, dict[Place, float]] = {
    "Table 2": {
        (REFERENCE, ALL): 2.759,
        **{
            (mixer, ratio): loss
            for mixer, losses in {
                "linear_attention": (2.892, 2.824),
                "lightning": (2.862, 2.758),
                "retention": (2.867, 2.759),
                "gla": (2.845, 2.754),
                "based": (2.754, 2.751),
                "rebased": (2.845, 2.787),
            }.items()
            for ratio, loss in zip(("pure", "1/4"), losses, strict=True)
        },
    },
    "Table 4": {
        (mixer, ratio): loss
        for mixer, losses in {
            "linear_attention": (2.892, 2.826, 2.824, 2.775),
            "lightning": (2.848, 2.756, 2.750, 2.742),
            "retention": (2.855, 2.757, 2.758, 2.748),
            "gla": (2.845, 2.751, 2.754, 2.753),
        }.items()
        for ratio, loss in zip(_SHARES, losses, strict=True)
    },
}
"""Losses by table. The two tables differ in what they give for Lightning Attention and Retention."""


@dataclass(frozen=True)
class Agreement:
    """Of pairs of models that the paper and a study both have, and that differ in the paper: how many are in the same order.

    num_unclear: of those in the other order, how many are no further from each other than both deviations over the seeds together,
    or are of one seed.
    """

    what: str
    num_pairs: int
    num_alike: int
    num_unclear: int

    def __str__(self) -> str:
        other = self.num_pairs - self.num_alike
        unclear = f"; of the {other} in the other {self.num_unclear} not clearly so" if other else ""
        return f"{self.what}: {self.num_alike} of {self.num_pairs} pairs in the same order{unclear}"


def agreements(losses: Mapping[Place, Spread]) -> dict[str, list[Agreement]]:
    """By table: mixers beside each other at each share of softmax layers, then shares beside each other for all mixers together.

    What has no pair is left out.
    """
    return {name: [found for found in _agreements(table, losses) if found.num_pairs] for name, table in TABLES.items()}


def _agreements(table: Mapping[Place, float], losses: Mapping[Place, Spread]) -> list[Agreement]:
    both = [place for place in table if place in losses]
    found = [
        _agreement(
            f"mixers, {ratio}",
            [pair for pair in combinations(both, 2) if pair[0][1] == ratio == pair[1][1]],
            table,
            losses,
        )
        for ratio in _SHARES
    ]
    shares = [pair for pair in combinations(both, 2) if pair[0][0] == pair[1][0]]
    against = [pair for pair in combinations(both, 2) if ((REFERENCE, ALL) in pair)]
    return [
        *found,
        _agreement("shares of softmax layers", shares, table, losses),
        _agreement("each against softmax alone", against, table, losses),
    ]


def _agreement(
    what: str, pairs: list[tuple[Place, Place]], table: Mapping[Place, float], losses: Mapping[Place, Spread]
) -> Agreement:
    differing = [(a, b) for a, b in pairs if table[a] != table[b]]
    others = [(a, b) for a, b in differing if (table[a] < table[b]) != (losses[a].mean < losses[b].mean)]
    unclear = sum(not losses[a].differs_from(losses[b]) for a, b in others)
    return Agreement(what, len(differing), len(differing) - len(others), unclear)
