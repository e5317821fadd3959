"""What the examples with models of Transformers share: a model and text at hand, or those that the command line names."""

from __future__ import annotations

import argparse
import os
import sysconfig
from pathlib import Path
from typing import Any

import torch


def parser(about: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--model", help="name or folder of a causal language model; a small one with random weights if not said"
    )
    made.add_argument("--text", type=Path, help="text file; sources of Python's standard library if not said")
    made.add_argument("--tokens", type=int, default=512, help="length of a sequence")
    made.add_argument("--steps", type=int, default=20)
    made.add_argument("--ranks-per-sequence", type=int, default=int(os.environ.get("WORLD_SIZE", "1")))
    return made


def small_model() -> Any:
    """Qwen3-Next's architecture in small: three layers of gated delta rule for one of softmax attention; a token is a byte."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    torch.manual_seed(0)
    config = Qwen3NextConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        layer_types=["linear_attention", "linear_attention", "linear_attention", "full_attention"],
        mlp_only_layers=[0, 1, 2, 3],
        router_aux_loss_coef=0.0,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return Qwen3NextForCausalLM(config)


def model_and_rows(arguments: argparse.Namespace) -> tuple[Any, list[dict[str, torch.Tensor]]]:
    """The model, and ids and labels ``[tokens]`` of one sequence after another: the same on every rank."""
    num_characters = 4 * arguments.tokens * arguments.steps
    if arguments.text is None:
        sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        text = "".join(source.read_text("utf-8", errors="replace") for source in sources[:40])[:num_characters]
    else:
        text = arguments.text.read_text("utf-8")
    if arguments.model is None:
        model, ids = small_model(), torch.tensor(list(text.encode()))
    else:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto")
        ids = AutoTokenizer.from_pretrained(arguments.model)(text, return_tensors="pt").input_ids[0]
    rows = ids[: len(ids) // arguments.tokens * arguments.tokens].view(-1, arguments.tokens)
    return model, [{"input_ids": row, "labels": row} for row in rows]
