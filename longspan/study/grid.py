"""Which trainings a study makes: a cell for each task, mixer, share of softmax layers and seed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from longspan.errors import ConfigError
from longspan.models.mixers import MIXERS

NUM_LAYERS = 8
"""Of every model: one of eight is the smallest share of softmax layers."""

RATIOS = {"pure": "L", "1/8": "LLLLLLLN", "1/4": "LLLN", "1/2": "LN"}
"""Shares of softmax layers, and the pattern of layers that has them (LASP-2, arXiv 2502.07563, appendix A.5.2)."""

REFERENCE = "softmax"
"""The mixer whose model has softmax layers alone."""

ALL = "all"
"""The share of softmax layers of the reference."""

TASKS = ("text", "recall")


@dataclass(frozen=True)
class Group:
    """Cells that differ in their seed alone. ratio: of `RATIOS`, or `ALL` for the reference."""

    task: str
    mixer: str
    ratio: str

    @property
    def layers(self) -> dict[str, Any]:
        """What the model's config says of its layers."""
        return {"pattern": "N"} if self.ratio == ALL else {"pattern": RATIOS[self.ratio], "operator": self.mixer}

    def __str__(self) -> str:
        return f"{self.task}, {self.mixer}" if self.ratio == ALL else f"{self.task}, {self.mixer}, {self.ratio}"


@dataclass(frozen=True)
class Cell:
    """One training."""

    group: Group
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        group = self.group
        return f"{group.task}-{group.mixer}-{group.ratio.replace('/', '-')}-seed{self.seed}"

    def __str__(self) -> str:
        return f"{self.group}, seed {self.seed}"


@dataclass(frozen=True)
class Grid:
    """The cells of a study; checked when it is made.

    mixers: of `MIXERS`; `REFERENCE` among them is one model, of softmax layers alone. ratios: of `RATIOS`, for each other mixer.

    Raises:
        ConfigError: for what is not known, which names the nearest, for none and for one that is there twice.
    """

    mixers: tuple[str, ...] = tuple(MIXERS)
    ratios: tuple[str, ...] = tuple(RATIOS)
    tasks: tuple[str, ...] = TASKS
    seeds: tuple[int, ...] = (0, 1, 2)

    def __post_init__(self) -> None:
        _check("mixers", self.mixers, MIXERS)
        _check("ratios", self.ratios, RATIOS)
        _check("tasks", self.tasks, TASKS)
        _check("seeds", self.seeds)
        for seed in self.seeds:
            if not 0 <= seed < 2**63:
                raise ConfigError(f"seeds must be whole numbers from 0 to 2^63 - 1; got {seed}")

    @property
    def groups(self) -> list[Group]:
        """By task, then by share of softmax layers."""
        found = []
        for task in self.tasks:
            if REFERENCE in self.mixers:
                found.append(Group(task, REFERENCE, ALL))
            found += [Group(task, mixer, ratio) for ratio in self.ratios for mixer in self.mixers if mixer != REFERENCE]
        return found

    @property
    def cells(self) -> list[Cell]:
        """In the order of work: the first seed of all groups, then the next, so that a part of the study is one of fewer seeds."""
        return [Cell(group, seed) for seed in self.seeds for group in self.groups]


def _check(what: str, given: tuple[Any, ...], known: Iterable[str] | None = None) -> None:
    if not given:
        raise ConfigError(f"{what} has none. Leave it out for all")
    twice = next((value for index, value in enumerate(given) if value in given[:index]), None)
    if twice is not None:
        raise ConfigError(f"{what} has {twice!r} twice. Give each once")
    if known is None:
        return
    names = list(known)
    for value in given:
        if value not in names:
            near = difflib.get_close_matches(value, names, n=1, cutoff=0.0)
            raise ConfigError(f"{what} must be of {', '.join(names)}; got {value!r}. Did you mean {near[0]!r}?")
