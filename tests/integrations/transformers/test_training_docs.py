"""What docs/transformers_training.md says: its proof runs, its recipes are lines of the examples, the faults it names are there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.compare import relative_error
from tests.integrations.transformers.families import build
from tests.integrations.transformers.training import Run, train

PROJECT_ROOT = Path(__file__).resolve().parents[3]
PAGE = (PROJECT_ROOT / "docs" / "transformers_training.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
EXAMPLES = ["finetune_trainer", "finetune_accelerate", "finetune_fsdp2"]


def test_the_proof_of_mixed_documents_runs() -> None:
    proof = [block for block in BLOCKS if "assert" in block]
    assert len(proof) == 1
    exec(compile(proof[0], "docs/transformers_training.md", "exec"), {})


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_recipes_are_lines_of_the_examples(number: int) -> None:
    # Those with shard_weights are run by test_shard_weights.py.
    recipes = [block for block in BLOCKS if "assert" not in block and "shard_weights" not in block]
    assert len(recipes) == len(EXAMPLES)
    example = (PROJECT_ROOT / "examples" / f"{EXAMPLES[number]}.py").read_text(encoding="utf-8")
    lines = iter([line.strip() for line in example.splitlines()])
    for line in recipes[number].splitlines():
        if line.strip() and line.strip() != "...,":
            assert line.strip() in lines, f"{EXAMPLES[number]}.py does not have, in this order: {line}"


def test_a_cache_mixes_packed_documents_in_softmax_layers() -> None:
    model: Any = build("llama")
    ids = torch.arange(1, 41)[None]
    positions = torch.cat([torch.arange(25), torch.arange(15)])[None]
    with torch.no_grad():
        alone = model(ids[:, 25:]).logits
        by_default, without = (
            model(ids, position_ids=positions, **options).logits[:, 25:] for options in ({}, {"use_cache": False})
        )
    assert relative_error(without, alone) < 1e-5
    assert relative_error(by_default, alone) > 0.05


@pytest.mark.slow
def test_trainer_by_itself_does_not_load_experts_when_it_resumes(tmp_path: Path) -> None:
    run = Run("qwen3_next", num_rows=13)
    want = train(run, str(tmp_path / "whole"), 0)
    saving = Run("qwen3_next", num_rows=13, arguments={"save_strategy": "steps", "save_steps": 3})
    train(saving, str(tmp_path / "saved"), 0, None, 3)
    found = train(run, str(tmp_path / "on"), 0, str(tmp_path / "saved" / "checkpoint-3"))
    assert abs(found.log["loss"][3] / want.log["loss"][3] - 1) > 1e-6
