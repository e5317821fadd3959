"""Configs by name: the shapes of published models, and small ones of their kind."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from longspan.errors import ConfigError
from longspan.models.config import LinearLlama3Config

PRESETS: dict[str, Mapping[str, Any]] = {
    # For a laptop's processor: the shapes of the main job, and a larger one.
    "linear-llama3-tiny": {
        "vocab_size": 2048,
        "dim": 128,
        "num_layers": 4,
        "num_heads": 2,
        "num_kv_heads": 1,
        "hidden_dim": 352,
    },
    "linear-llama3-small": {
        "vocab_size": 32_000,
        "dim": 512,
        "num_layers": 8,
        "num_heads": 8,
        "num_kv_heads": 2,
        "hidden_dim": 1408,
    },
    # Layers, width and heads of LASP-2's experiments (arXiv 2502.07563, section 4); the rest of Llama 3.2 1B, which has these.
    "linear-llama3-1b": {
        "vocab_size": 128_256,
        "dim": 2048,
        "num_layers": 16,
        "num_heads": 16,
        "num_kv_heads": 8,
        "hidden_dim": 8192,
        "tie_embeddings": True,
    },
    # Llama 3 8B (arXiv 2407.21783, table 3).
    "linear-llama3-8b": {
        "vocab_size": 128_256,
        "dim": 4096,
        "num_layers": 32,
        "num_heads": 32,
        "num_kv_heads": 8,
        "hidden_dim": 14_336,
    },
    # Linear-MoE's two series (arXiv 2503.05447): layers, width, heads, experts and their width; the vocabulary of Qwen2, whose
    # tokenizer its scripts take. Named after the parameters that a token meets, and all of them, without the tables of words.
    "linear-moe-a0.3b-2b": {
        "vocab_size": 151_936,
        "dim": 1024,
        "num_layers": 12,
        "num_heads": 8,
        "hidden_dim": 896,
        "num_experts": 64,
        "experts_per_token": 8,
    },
    "linear-moe-a1b-7b": {
        "vocab_size": 151_936,
        "dim": 2048,
        "num_layers": 16,
        "num_heads": 16,
        "hidden_dim": 1024,
        "num_experts": 64,
        "experts_per_token": 8,
    },
}
"""Fields of `LinearLlama3Config`, by name. Every fourth layer is softmax attention (LASP-2H) and the others are simple_gla, unless
`pattern` and `operator` say otherwise."""


def preset(name: str, **changes: Any) -> LinearLlama3Config:
    """A config of `PRESETS`, with other values for some of its fields: ``preset("linear-llama3-1b", operator="gla")``.

    Raises:
        ConfigError: for a name that is not there, which names the nearest; and for changes that make no model.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(str(name), PRESETS, n=1, cutoff=0.0)
        raise ConfigError(f"there is no preset {name!r}. Did you mean {near[0]!r}? There are {', '.join(PRESETS)}")
    return LinearLlama3Config(**{**PRESETS[name], **changes})
