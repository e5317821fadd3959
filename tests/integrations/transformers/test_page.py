"""docs/transformers.md: its blocks run on one process and on two ranks, and its table is of the families and release at hand."""

from __future__ import annotations

import re

import torch
import transformers

from longspan.integrations.transformers.versions import TESTED
from tests.integrations.transformers.families import FAMILIES, FLA_FAMILIES
from tests.integrations.transformers.support_table import BEGIN, END, FLA_BEGIN, FLA_END, PAGE
from tests.ranks import run_on_ranks

TEXT = PAGE.read_text(encoding="utf-8")


def run_blocks() -> None:
    torch.manual_seed(0)
    code = "\n".join(re.findall(r"^```python\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL))
    exec(compile(code, str(PAGE), "exec"), {"__name__": "page"})


def test_the_blocks_run() -> None:
    run_blocks()
    run_on_ranks(2, run_blocks)


def test_the_table_of_fla_is_of_these_families_and_the_tested_release() -> None:
    table = TEXT[TEXT.index(FLA_BEGIN) : TEXT.index(FLA_END)]
    (release, _) = TESTED["fla"]
    assert f"flash-linear-attention {release[0]}.{release[1]}." in table
    assert f"Transformers {transformers.__version__}," in table
    shown = re.findall(r"^\| `(\w+)`", table, flags=re.MULTILINE)
    assert shown == [family.model for family in FLA_FAMILIES.values()]
    assert "**" not in table and "fails" not in table and "| no |" not in table


def test_the_table_is_of_these_families_and_this_release() -> None:
    table = TEXT[TEXT.index(BEGIN) : TEXT.index(END)]
    assert f"Transformers {transformers.__version__}," in table
    shown = re.findall(r"^\| `(\w+)`", table, flags=re.MULTILINE)
    assert shown == [family.model for family in FAMILIES.values()]
    assert "**" not in table and "fails" not in table and "| no |" not in table
