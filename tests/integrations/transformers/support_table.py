"""Runs every family and writes the table of docs/transformers.md: ``python -m tests.integrations.transformers.support_table``."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import transformers

from longspan.errors import LongspanError
from longspan.integrations.transformers.mixers import mixers_of
from longspan.integrations.transformers.structure import backbone_of
from longspan.layout import Order
from tests.compare import worst
from tests.integrations.transformers.families import FAMILIES, build
from tests.integrations.transformers.test_checkpointing import compared
from tests.integrations.transformers.test_families import TOLERANCE, errors_over_ranks, expected_of
from tests.ranks import RankError, run_on_ranks, stop_ranks

PAGE = Path(__file__).resolve().parents[3] / "docs" / "transformers.md"
BEGIN, END = "<!-- support table: begin -->", "<!-- support table: end -->"

COLUMNS: Mapping[str, tuple[str, int, Order]] = {
    "2 ranks, zigzag": ("plain", 2, "zigzag"),
    "2 ranks, zigzag, packed": ("packed", 2, "zigzag"),
    "4 ranks, contiguous, packed": ("packed", 4, "contiguous"),
}


def error_of(name: str, kind: str, num_ranks: int, order: Order) -> str:
    """The worst error of loss, logits and gradients over all ranks, in float64."""
    try:
        found = run_on_ranks(num_ranks, errors_over_ranks, name, kind, order, {}, expected_of(name, kind))
    except (RankError, LongspanError) as failure:
        return f"fails: {type(failure).__name__}"
    error = worst(worst(errors) for errors in found)
    return f"{error:.0e}" if error < TOLERANCE else f"**{error:.0e}**"


def checkpointing_of(name: str) -> str:
    try:
        for reentrant in (True, False):
            run_on_ranks(2, compared, name, reentrant, False, False)
    except RankError:
        return "no"
    return "same bits"


def rows() -> list[str]:
    lines = [
        "| model | layers | " + " | ".join(COLUMNS) + " | gradient checkpointing |",
        "|---" * (len(COLUMNS) + 3) + "|",
    ]
    for name, family in FAMILIES.items():
        kinds = sorted({type(mixer).__name__ for mixer in mixers_of(backbone_of(build(name)))})
        cells = [f"`{family.model}`", ", ".join(f"`{kind}`" for kind in kinds)]
        cells += [error_of(name, *what) for what in COLUMNS.values()]
        lines.append("| " + " | ".join([*cells, checkpointing_of(name)]) + " |")
        sys.stdout.write(lines[-1] + "\n")
        sys.stdout.flush()
    return lines


def table() -> str:
    about = f"Transformers {transformers.__version__}, {time.strftime('%Y-%m-%d')}"
    return "\n".join(
        [BEGIN, "", f"{about}, by `python -m tests.integrations.transformers.support_table`:", "", *rows(), "", END]
    )


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    written = table()
    PAGE.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: written, page, flags=re.DOTALL), encoding="utf-8")
    stop_ranks()


if __name__ == "__main__":
    main()
