"""What a step in segments of time holds grows with the sequence by what enters segments alone: the formula of docs/stream.md."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longspan import SequenceLayout, parallelize, stream
from tests.live_bytes import LiveBytes
from tests.models.tiny import random_tokens, tiny_model
from tests.ranks import run_on_ranks

SEGMENT = 32
SHORT, LONG = 2 * SEGMENT, 8 * SEGMENT
SIZES: dict[str, Any] = {"num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 4, "hidden_dim": 40}
STATE, KEYS = 2 * 4 * 4 * 8, 2 * 4 * 8
"""Bytes of the state of a layer of simple_gla, and of a token's key and value in a softmax layer, float64."""


def test_live_bytes_are_those_that_live_at_once() -> None:
    with LiveBytes() as live:
        for _ in range(3):
            x = torch.ones(100, dtype=torch.float64)
            y = x[:50].view(5, 10)
            y.mul_(2.0)
            z = y.clone()
            del x, y, z
    assert live.most == 100 * 8 + 50 * 8


def most_bytes(length: int, segment_tokens: int | None, **options: Any) -> int:
    """Of a step on this rank, beside gradients of parameters, which are there."""
    changes = options.pop("changes")
    model = parallelize(tiny_model(**(SIZES | changes)), None)
    tokens = random_tokens(1, length + 1)
    layout = SequenceLayout(length)
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with LiveBytes() as live:
        if segment_tokens is None:
            num_valid = labels.numel()
            model(layout.shard(inputs), layout, labels=layout.shard(labels), num_valid=num_valid).backward()
        else:
            stream(model, segment_tokens, **options).forward_backward(inputs, labels, layout)
    return live.most


def growth(segment_tokens: int | None, **options: Any) -> int:
    """From a short sequence to a long one."""
    return most_bytes(LONG, segment_tokens, **options) - most_bytes(SHORT, segment_tokens, **options)


LINEAR = {"pattern": "L"}
HYBRID = {"pattern": "LN"}
MORE_SEGMENTS, MORE_TOKENS = (LONG - SHORT) // SEGMENT, LONG - SHORT


def growths(num_ranks: int, *cases: tuple[int | None, dict[str, Any]]) -> list[list[int]]:
    """Of each case on each rank."""
    return run_on_ranks(num_ranks, growths_on_rank, list(cases))


def growths_on_rank(cases: list[tuple[int | None, dict[str, Any]]]) -> list[int]:
    return [growth(segment_tokens, **options) for segment_tokens, options in cases]


def test_memory_grows_by_what_enters_segments_alone() -> None:
    """Of float64 tensors, to a twentieth: beside them there are sums of a few numbers for each segment."""
    kept, hybrid = growths(1, (SEGMENT, {"changes": LINEAR}), (SEGMENT, {"changes": HYBRID}))[0]
    states, keys = 2 * MORE_SEGMENTS * STATE, MORE_TOKENS * 2 * KEYS
    assert kept == pytest.approx(states, rel=0.05)
    assert hybrid == pytest.approx(states / 2 + keys, rel=0.05)


@pytest.mark.slow
def test_memory_grows_less_where_less_is_kept_and_more_without_segments() -> None:
    whole, every_fourth, offloaded = growths(
        1,
        (None, {"changes": LINEAR}),
        (SEGMENT, {"changes": LINEAR, "keep_every": 4}),
        (SEGMENT, {"changes": HYBRID, "offload": True}),
    )[0]
    states, keys = 2 * MORE_SEGMENTS * STATE, MORE_TOKENS * 2 * KEYS
    # Of 8 segments six are kept at most, of 2 both.
    assert every_fourth <= 1.05 * 2 * 4 * STATE
    assert whole > 20 * states
    assert offloaded == pytest.approx(states / 2 + keys, rel=0.05)


# One process runs in make test, above.
@pytest.mark.slow
def test_over_ranks_each_keeps_the_keys_of_its_own_tokens() -> None:
    for (hybrid,) in growths(2, (SEGMENT, {"changes": HYBRID})):
        assert hybrid == pytest.approx(MORE_SEGMENTS * STATE + MORE_TOKENS * 2 * KEYS / 2, rel=0.05)


@pytest.mark.slow
def test_in_a_window_gradients_are_of_what_is_seen() -> None:
    (found,) = growths(1, (SEGMENT, {"changes": {**HYBRID, "window": 9}}))[0]
    assert found == pytest.approx(MORE_SEGMENTS * (STATE + 8 * KEYS), rel=0.05)
