"""The sample of a run ends where the model's logits are no numbers, and overflows at no temperature."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longspan.data.tokenizer import ByteTokenizer
from longspan.train.sample import generate


class Counter(nn.Module):
    """Gives the token after the last one by far the largest logit; from `ends_at` on, NaN."""

    def __init__(self, ends_at: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1e4))
        self.ends_at = ends_at

    def init_cache(self, batch_size: int) -> None:
        return None

    def step(self, tokens: Tensor, cache: Any) -> Tensor:
        last = int(tokens[0, 0])
        logits = self.scale * nn.functional.one_hot((tokens + 1) % 257, 257).float()
        return logits * torch.nan if self.ends_at <= last < 256 else logits


@pytest.mark.parametrize("temperature", [0.0, 1e-320, 1e-30, 0.8])
def test_a_sample_is_likely_at_every_temperature(temperature: float) -> None:
    assert generate(Counter(255), ByteTokenizer(), "a", 3, temperature, 0) == "bcd"


def test_a_sample_ends_where_there_are_no_numbers() -> None:
    assert generate(Counter(ord("c")), ByteTokenizer(), "a", 9, 0.8, 0) == "bc"
