"""The sample of a run is what its model finds likely; it ends where logits are no numbers, and overflows at no temperature."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from longspan.data.tokenizer import ByteTokenizer
from longspan.models import ModelMemory
from longspan.train.sample import generate
from tests.models.tiny import tiny_model


class Counter:
    """Gives the token after the last one by far the largest logit; from `ends_at` on, NaN."""

    def __init__(self, ends_at: int) -> None:
        self.ends_at = ends_at

    def __call__(
        self, tokens: Tensor, *, memory: ModelMemory | None, output_memory: bool
    ) -> tuple[Tensor, ModelMemory]:
        seen = 0 if memory is None else memory.num_tokens
        last = int(tokens[0, -1])
        logits = 1e4 * nn.functional.one_hot((tokens + 1) % 257, 257).float()
        found = logits * torch.nan if self.ends_at <= last < 256 else logits
        return found, ModelMemory(seen + tokens.shape[1], ())


@pytest.mark.parametrize("temperature", [0.0, 1e-320, 1e-30, 0.8])
def test_a_sample_is_likely_at_every_temperature(temperature: float) -> None:
    assert generate(Counter(255), ByteTokenizer(), "a", 3, temperature, 0) == "bcd"


def test_a_sample_ends_where_there_are_no_numbers() -> None:
    assert generate(Counter(ord("c")), ByteTokenizer(), "a", 9, 0.8, 0) == "bc"


@pytest.mark.parametrize("operator", ["simple_gla", "gated_delta_rule"])
def test_a_greedy_sample_is_that_of_the_whole_prefix_computed_again(operator: str) -> None:
    """Also where the prompt has more tokens than one, and a window cuts it."""
    tokenizer = ByteTokenizer()
    model = tiny_model(vocab_size=257, operator=operator, pattern="LN", window=6)
    tokens = [tokenizer.end_of_document, *tokenizer.encode(["a prompt"])[0]]
    num_given = len(tokens)
    with torch.no_grad():
        for _ in range(12):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    assert generate(model, tokenizer, "a prompt", 12, 0.0, 0) == tokenizer.decode(tokens[num_given:])
