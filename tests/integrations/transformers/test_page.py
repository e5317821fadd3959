"""docs/transformers.md: its blocks run on one process and on two ranks, and its table is of the families and release at hand."""

from __future__ import annotations

import re

import torch
import transformers

from tests.integrations.transformers.families import FAMILIES
from tests.integrations.transformers.support_table import BEGIN, END, PAGE
from tests.ranks import run_on_ranks

TEXT = PAGE.read_text(encoding="utf-8")


def run_blocks() -> None:
    torch.manual_seed(0)
    code = "\n".join(re.findall(r"^```python\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL))
    exec(compile(code, str(PAGE), "exec"), {"__name__": "page"})


def test_the_blocks_run() -> None:
    run_blocks()
    run_on_ranks(2, run_blocks)


def test_the_table_is_of_these_families_and_this_release() -> None:
    table = TEXT[TEXT.index(BEGIN) : TEXT.index(END)]
    assert f"Transformers {transformers.__version__}," in table
    shown = re.findall(r"^\| `(\w+)`", table, flags=re.MULTILINE)
    assert shown == [family.model for family in FAMILIES.values()]
    assert "**" not in table and "fails" not in table and "| no |" not in table
