"""The blocks of docs/stream.md run, on shorter sequences than they have."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import run_on_ranks

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "stream.md").read_text(encoding="utf-8")
SHORTER = {"8193": "129", "2048": "32", "8192": "128", "4096": "96", "512": "32"}


def blocks() -> list[str]:
    """Python blocks, in order: of one process, over ranks, of Transformers, with memory given back, of a model of one's own."""
    found = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    return [re.sub(r"\b(8193|2048|8192|4096|512)\b", lambda match: SHORTER[match.group()], block) for block in found]


def values_of(*parts: str) -> list[float]:
    """The losses that the blocks have found, one after another in one namespace."""
    names: dict[str, Any] = {"group": None}
    losses = []
    for part in parts:
        exec(compile(part, "<docs/stream.md>", "exec"), names)
        losses.append(float(names["loss"]))
    return losses


def test_the_page_has_the_blocks_that_are_run() -> None:
    assert len(blocks()) == 5 and "import transformers" in blocks()[2] and "8192" not in "".join(blocks())


def on_rank() -> list[float]:
    torch.manual_seed(0)
    return values_of(*blocks()[:2])


def test_a_sequence_alone_and_over_ranks_has_the_same_loss() -> None:
    found = run_on_ranks(2, on_rank)
    (alone, first), (_, second) = found
    assert first + second == pytest.approx(alone, rel=1e-5)


def test_memory_is_given_back_between_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """After every fourth: a sequence of four segments has seven."""
    released: list[None] = []
    monkeypatch.setattr("longspan.train.memory.release_freed_memory", lambda: released.append(None))
    first, second = values_of(blocks()[0], blocks()[3])
    assert first == pytest.approx(second, rel=1e-6) and len(released) == 1


@pytest.mark.slow
def test_a_model_of_transformers() -> None:
    (loss,) = values_of(blocks()[0] + blocks()[2])
    assert 4.0 < loss < 6.0
