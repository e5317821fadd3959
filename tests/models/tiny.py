"""Small models that the model tests share."""

from __future__ import annotations

from typing import Any

import torch

from longspan.models import LinearLlama3, LinearLlama3Config


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
