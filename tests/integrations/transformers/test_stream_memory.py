"""Models of Transformers in segments of time: what a step, or a prompt, holds grows by what enters segments alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import longspan
from longspan.integrations.transformers import stream_batch
from tests.integrations.transformers.families import build
from tests.integrations.transformers.prompts import prompt
from tests.integrations.transformers.reference import Wide, batch
from tests.live_bytes import LiveBytes

SEGMENT = 32
SHORT, LONG = 2 * SEGMENT, 8 * SEGMENT
MORE_SEGMENTS, MORE_TOKENS = (LONG - SHORT) // SEGMENT, LONG - SHORT
HYBRID: dict[str, Any] = {"num_hidden_layers": 2, "attn_layer_indices": [1]}
STATE, KEYS = (6 * 8 * 10 + (6 * 8 + 2 * 2 * 10) * 3) * 8, 2 * 2 * 6 * 8
"""Of Bamba, in float64: bytes of a Mamba-2 layer's state and taps, and of a token's key and value in a softmax layer."""
NOTES = 4 * 8
"""Bytes of a token that layers note of the tokens themselves, whatever the model's width: positions and the like."""


def growth(run: Callable[[int], Callable[[], object]]) -> int:
    """Bytes that live at once on a long sequence, more than on a short one; `run`: what is to be measured, of a length."""
    most = []
    for length in (SHORT, LONG):
        step = run(length)
        with LiveBytes() as live, Wide():
            step()
        most.append(live.most)
    return most[1] - most[0]


def of_a_step(model: Any, segment_tokens: int | None) -> int:
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def step(length: int) -> Callable[[], object]:
        given = batch(1, length)
        if segment_tokens is None:
            return lambda: model(**given.arguments()).loss.backward()
        arguments = stream_batch(model, given.arguments())
        return lambda: longspan.stream(model, segment_tokens).forward_backward(**arguments)

    return growth(step)


def of_a_prompt(name: str, segment_tokens: int | None, **options: Any) -> int:
    model = longspan.parallelize(build(name, **options), None).eval()
    return growth(lambda length: lambda: longspan.prefill(model, prompt(1, length), segment_tokens=segment_tokens))


# Models of the project run in make test, in `tests/streaming/test_memory.py`.
@pytest.mark.slow
def test_memory_of_a_step_grows_by_what_enters_segments_alone() -> None:
    """States and taps of each segment, keys and values of each token, and their gradients."""
    model = longspan.parallelize(build("bamba", **HYBRID), None)
    expected = MORE_SEGMENTS * STATE + MORE_TOKENS * 2 * KEYS
    assert expected <= of_a_step(model, SEGMENT) <= expected + MORE_TOKENS * NOTES
    assert of_a_step(model, None) > 5 * expected


def test_memory_of_a_prompt_grows_by_its_cache_alone() -> None:
    """Keys and values twice, as layers attend to them and for the cache."""
    assert of_a_prompt("mamba2", SEGMENT) <= MORE_TOKENS * NOTES
    assert of_a_prompt("bamba", SEGMENT, **HYBRID) <= MORE_TOKENS * (2 * KEYS + NOTES)
    assert of_a_prompt("mamba2", None) > 20 * MORE_TOKENS * NOTES
