"""docs/reliability.md: every fault has a row, and every test that it names exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def names_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_test_that_is_named_exists() -> None:
    named = set(NAMED.findall(TEXT))
    assert len(named) > 40
    missing = {f"{file}::{name}" for file, name in named if name not in names_in(ROOT / file)}
    assert not missing
    assert len(named) == len(set(re.findall(r"`(tests/[^`]+)`", TEXT)))


def test_every_fault_is_listed_once_with_a_promise_and_a_test() -> None:
    rows = [line for line in TEXT.splitlines() if re.match(r"\| F\d+ ", line)]
    assert [line.split("|")[1].strip() for line in rows] == [f"F{number}" for number in range(1, 18)]
    promises = set(re.findall(r"^\| (P\d+) ", TEXT, re.MULTILINE))
    assert promises == {f"P{number}" for number in range(1, 13)}
    for line in rows:
        assert NAMED.search(line), line
        assert set(line.split("|")[4].split()) <= promises, line
    assert {promise for line in rows for promise in line.split("|")[4].split()} == promises
