"""Runs every family and writes the tables of docs/transformers.md: ``python -m tests.integrations.transformers.support_table``.

That of flash-linear-attention's models is written by ``... support_table fla`` where the package can be imported. For the other
table it must not be: Transformers would take its kernels.
"""

from __future__ import annotations

import re
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import transformers

from longspan.errors import LongspanError
from longspan.integrations.transformers.mixers import mixers_of
from longspan.integrations.transformers.structure import backbone_of
from longspan.layout import Order
from tests.compare import worst
from tests.integrations.transformers.families import FAMILIES, FLA_FAMILIES, Family, build
from tests.integrations.transformers.fla_on_cpu import fla_on_cpu
from tests.integrations.transformers.prompts import WITH_CACHE, errors_of, of_ranks
from tests.integrations.transformers.prompts import expected as memory_of
from tests.integrations.transformers.test_checkpointing import compared
from tests.integrations.transformers.test_families import TOLERANCE, errors_over_ranks, expected_of
from tests.integrations.transformers.test_fla import expected_of as expected_of_fla
from tests.integrations.transformers.test_fla import on_cpu
from tests.integrations.transformers.test_stream import errors_of_this_rank as errors_in_segments
from tests.ranks import RankError, run_on_ranks, stop_ranks

PAGE = Path(__file__).resolve().parents[3] / "docs" / "transformers.md"
BEGIN, END = "<!-- support table: begin -->", "<!-- support table: end -->"
FLA_BEGIN, FLA_END = "<!-- support table of fla: begin -->", "<!-- support table of fla: end -->"

COLUMNS: Mapping[str, tuple[str, int, Order]] = {
    "2 ranks, zigzag": ("plain", 2, "zigzag"),
    "2 ranks, zigzag, packed": ("packed", 2, "zigzag"),
    "4 ranks, contiguous, packed": ("packed", 4, "contiguous"),
}


def run(function: Callable[..., Any], num_ranks: int, name: str, *args: Any) -> list[Any]:
    """`function` on ranks, for a family of either package."""
    if name in FLA_FAMILIES:
        return run_on_ranks(num_ranks, on_cpu, function, name, *args)
    return run_on_ranks(num_ranks, function, name, *args)


def error_of(name: str, kind: str, num_ranks: int, order: Order) -> str:
    """The worst error of loss, logits and gradients over all ranks, in float64."""
    try:
        want = expected_of_fla(name, kind) if name in FLA_FAMILIES else expected_of(name, kind)
        found = run(errors_over_ranks, num_ranks, name, kind, order, {}, want)
    except (RankError, LongspanError) as failure:
        return f"fails: {type(failure).__name__}"
    error = worst(worst(errors) for errors in found)
    return f"{error:.0e}" if error < TOLERANCE else f"**{error:.0e}**"


def checkpointing_of(name: str) -> str:
    kinds = []
    for reentrant in (False, True):
        try:
            run(compared, 2, name, reentrant, False, False)
            kinds.append(reentrant)
        except RankError:
            pass
    return {(False, True): "same bits", (False,): "same bits, not reentrant"}.get(tuple(kinds), "no")


def prefill_of(name: str) -> str:
    """The worst error of a prompt's cache and logits, on the one rank of two that decodes, and by the tokens that follow."""
    if name not in WITH_CACHE and name in FAMILIES:
        return "refused"
    try:
        want = on_cpu(memory_of, name) if name in FLA_FAMILIES else memory_of(name)
        found = run(of_ranks, 2, name, "zigzag", "last", None)
    except (RankError, LongspanError) as failure:
        return f"fails: {type(failure).__name__}"
    error = worst(worst(errors_of(got, want)) for _, got in found if got is not None)
    return f"{error:.0e}" if error < TOLERANCE else f"**{error:.0e}**"


def segments_of(name: str) -> str:
    """The worst error of loss and gradients in segments of 10 tokens, of packed documents on two ranks."""
    if name in FLA_FAMILIES:
        return "refused"
    try:
        found = run(errors_in_segments, 2, name, "packed", "zigzag", 10, {}, expected_of(name, "packed"))
    except (RankError, LongspanError) as failure:
        return f"fails: {type(failure).__name__}"
    error = worst(worst(errors) for errors in found)
    return f"{error:.0e}" if error < TOLERANCE else f"**{error:.0e}**"


def mixers_by_name(name: str) -> list[str]:
    """The classes of a family's mixers."""
    context: Any = fla_on_cpu() if name in FLA_FAMILIES else nullcontext()
    with context:
        return sorted({type(mixer).__name__ for mixer in mixers_of(backbone_of(build(name)))})


def rows(families: Mapping[str, Family]) -> list[str]:
    lines = [
        "| model | layers | " + " | ".join(COLUMNS) + " | gradient checkpointing | segments of time | prefill |",
        "|---" * (len(COLUMNS) + 5) + "|",
    ]
    for name, family in families.items():
        cells = [f"`{family.model}`", ", ".join(f"`{kind}`" for kind in mixers_by_name(name))]
        cells += [error_of(name, *what) for what in COLUMNS.values()]
        cells += [checkpointing_of(name), segments_of(name), prefill_of(name)]
        lines.append("| " + " | ".join(cells) + " |")
        sys.stdout.write(lines[-1] + "\n")
        sys.stdout.flush()
    return lines


def table(of_fla: bool) -> str:
    about = f"Transformers {transformers.__version__}, {time.strftime('%Y-%m-%d')}"
    command = "python -m tests.integrations.transformers.support_table"
    begin, end, families = BEGIN, END, FAMILIES
    if of_fla:
        release = import_module("fla").__version__
        about, command = f"flash-linear-attention {release}, {about}", f"{command} fla"
        begin, end, families = FLA_BEGIN, FLA_END, FLA_FAMILIES
    return "\n".join([begin, "", f"{about}, by `{command}`:", "", *rows(families), "", end])


def main() -> None:
    of_fla = sys.argv[1:] == ["fla"]
    warnings.simplefilter("ignore")
    written = table(of_fla)
    page = PAGE.read_text(encoding="utf-8")
    begin, end = (FLA_BEGIN, FLA_END) if of_fla else (BEGIN, END)
    PAGE.write_text(re.sub(f"{begin}.*{end}", lambda _: written, page, flags=re.DOTALL), encoding="utf-8")
    stop_ranks()


if __name__ == "__main__":
    main()
