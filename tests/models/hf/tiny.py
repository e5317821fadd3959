"""Small models that the tests of the Hugging Face classes share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longspan.models.hf import LinearLlamaForCausalLM
from tests.models.tiny import random_tokens, tiny_model

KINDS: dict[str, dict[str, Any]] = {
    # Convolutions, whose taps are remembered, and a parameter that layers share.
    "pure": {"pattern": ("kda", "hgrn2", "mamba2", "hgrn2"), "num_layers": 4},
    "hybrid": {"pattern": "LN", "operator": "simple_gla"},
    "experts": {"pattern": "LN", "operator": "simple_gla", "num_experts": 4, "hidden_dim": 12},
    "window": {"pattern": "NL", "operator": "gla", "window": 5},
}


def tiny_hf(kind: str = "hybrid", config: dict[str, Any] | None = None, **changes: Any) -> LinearLlamaForCausalLM:
    """A float64 model of two layers, or four, in evaluation mode, whose weights are large enough for every layer to matter."""
    sizes = {"num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 10}
    return LinearLlamaForCausalLM.of(tiny_model(**sizes | KINDS[kind] | changes), **(config or {}))


def padded(
    lengths: list[int], side: str, pad: int = 0, width: int | None = None
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Rows of these lengths padded on a side to the longest, their attention mask, and the rows by themselves."""
    width = max(lengths) if width is None else width
    rows = [random_tokens(1, length, seed=number)[0] for number, length in enumerate(lengths)]
    tokens = torch.full((len(rows), width), pad)
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for number, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        tokens[number, place], mask[number, place] = row, 1
    return tokens, mask, rows


def alone(model: LinearLlamaForCausalLM, row: Tensor) -> Tensor:
    """Logits of a row by the model inside, ``[N, V]``."""
    with torch.no_grad():
        return model.model(row[None])[0]
