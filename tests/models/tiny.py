"""Small models that the model tests share."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longspan.models import MIXERS, LinearLlama3, LinearLlama3Config

LINEAR_MIXERS = [name for name in MIXERS if name != "softmax"]
QUICK = ("simple_gla", "hgrn2", "mamba2", "kda")
"""Of a state that decays, a parameter that layers share, a convolution, and a delta rule, one each."""


def each_linear_mixer(quick: tuple[str, ...] = QUICK) -> list[Any]:
    """Every linear mixer, as parameters of a test of which few run with the quick ones."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in LINEAR_MIXERS]


def tiny_model(**changes: Any) -> LinearLlama3:
    """A float64 model whose weights are large enough for every layer to matter."""
    values = {
        "vocab_size": 29,
        "dim": 16,
        "num_layers": 4,
        "num_heads": 4,
        "num_kv_heads": 2,
        "hidden_dim": 24,
        **changes,
    }
    model = LinearLlama3(LinearLlama3Config(**values)).double()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=0.2)
    return model


def random_tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 29, (batch, length), generator=torch.Generator().manual_seed(seed))
