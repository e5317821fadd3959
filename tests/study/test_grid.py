"""A study's cells: each once, in an order that is useful early, each with a config that differs in what it studies alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from longspan.errors import ConfigError
from longspan.models.mixers import MIXERS
from longspan.study.grid import ALL, REFERENCE, Cell, Grid, Group
from longspan.study.size import SIZES, Size
from longspan.train.config import Config, flatten

RUN, DATA = Path("study/cells/run"), Path("study/data")
ABOUT_THE_CELL = {"model.pattern", "model.operator", "train.seed"}


def config_of(cell: Cell, size: Size = SIZES["short"]) -> Config:
    return size.config(cell, RUN, DATA, threads=1)


def test_all_is_each_mixer_at_each_share_and_softmax_alone_on_both_tasks_with_three_seeds() -> None:
    grid = Grid()
    linear = [name for name in MIXERS if name != REFERENCE]
    groups = {(group.task, group.mixer, group.ratio) for group in grid.groups}
    assert groups == {
        *(
            (task, name, ratio)
            for task in ("text", "recall")
            for name in linear
            for ratio in ("pure", "1/8", "1/4", "1/2")
        ),
        *((task, REFERENCE, ALL) for task in ("text", "recall")),
    }
    assert len(grid.cells) == 3 * len(grid.groups) == 3 * len(groups)
    assert len({cell.name for cell in grid.cells}) == len(grid.cells)
    # One seed of everything comes before the next.
    assert [cell.seed for cell in grid.cells] == sorted(cell.seed for cell in grid.cells)


# The same grid.
@pytest.mark.slow_rows(r"^night$")
@pytest.mark.parametrize("name", SIZES)
def test_cells_of_a_task_differ_in_layers_and_seed_alone(name: str) -> None:
    for task in ("text", "recall"):
        cells = [cell for cell in Grid().cells if cell.group.task == task]
        first = flatten(config_of(cells[0], SIZES[name]))
        for cell in cells:
            values = flatten(config_of(cell, SIZES[name]))
            assert {key for key in values if values[key] != first[key]} <= ABOUT_THE_CELL, cell
            assert values["train.seed"] == cell.seed


@pytest.mark.parametrize(
    ("ratio", "kinds"),
    [("pure", "LLLLLLLL"), ("1/8", "LLLLLLLN"), ("1/4", "LLLNLLLN"), ("1/2", "LNLNLNLN")],
)
def test_a_share_is_that_of_softmax_layers(ratio: str, kinds: str) -> None:
    model = config_of(Cell(Group("text", "gla", ratio), 0)).model.build(vocab_size=300)
    assert "".join(model.layer_kinds) == kinds
    assert set(model.layer_operators) <= {"gla", "softmax"}
    alone = config_of(Cell(Group("text", REFERENCE, ALL), 0)).model.build(vocab_size=300)
    assert set(alone.layer_operators) == {"softmax"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mixers": ("gla", "mamb2")}, "mixers must be of .*; got 'mamb2'. Did you mean 'mamba2'?"),
        ({"ratios": ("1/3",)}, "ratios must be of pure, 1/8, 1/4, 1/2; got '1/3'"),
        ({"tasks": ("texts",)}, "tasks must be of text, recall; got 'texts'. Did you mean 'text'?"),
        ({"mixers": ("gla", "gla")}, "mixers has 'gla' twice"),
        ({"seeds": ()}, "seeds has none"),
        ({"seeds": (0, -1)}, "seeds must be whole numbers from 0"),
    ],
)
def test_what_is_not_known_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Grid(**values)
