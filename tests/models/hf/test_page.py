"""docs/hugging_face_models.md: its blocks run on one process and on two ranks, and its names are those of the classes."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from longspan.models.hf import LinearLlamaConfig
from tests.models.hf.tiny import tiny_hf
from tests.ranks import run_on_ranks

PAGE = Path(__file__).resolve().parents[3] / "docs" / "hugging_face_models.md"
TEXT = PAGE.read_text(encoding="utf-8")


def run_blocks(saves: bool) -> None:
    torch.manual_seed(0)
    blocks = re.findall(r"^```python\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)
    code = "\n".join(block for block in blocks if saves or "save_pretrained" not in block)
    exec(compile(code, str(PAGE), "exec"), {"__name__": "page"})


def test_the_blocks_run() -> None:
    run_blocks(True)
    # Of several processes Transformers lets the first one save.
    run_on_ranks(2, run_blocks, False)


def test_the_names_on_the_page_are_those_of_the_classes() -> None:
    config = LinearLlamaConfig()
    assert all(f"`{name}`" in TEXT for name in config.attribute_map)
    for name in ("max_position_embeddings", "documents", "logits_in_training", "use_cache", "eos_token_id"):
        assert hasattr(config, name) and f"`{name}`" in TEXT
    model = tiny_hf("hybrid")
    projections = {
        name.rsplit(".", 1)[1] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
    }
    assert {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj", "out_proj", "head"} <= projections
