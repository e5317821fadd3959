"""A prompt that is read in segments takes the activations of one, however long it is, and beside them what is remembered."""

from __future__ import annotations

from typing import Any

import pytest

from longspan import parallelize
from longspan.models import prefill
from tests.live_bytes import LiveBytes
from tests.models.tiny import random_tokens, tiny_model
from tests.ranks import run_on_ranks

SEGMENT = 32
SHORT, LONG = 2 * SEGMENT, 8 * SEGMENT
SIZES: dict[str, Any] = {"num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "head_dim": 32}
KEYS = (LONG - SHORT) * 2 * 2 * 32 * 8
"""Bytes of keys and values of one softmax layer by which a long prompt has more, float64."""


def growth(pattern: str, segment_tokens: int | None) -> int:
    """Bytes that live at once on this rank while a long prompt is read, more than for a short one."""
    model = parallelize(tiny_model(pattern=pattern, **SIZES), None)
    found = []
    for length in (SHORT, LONG):
        with LiveBytes() as live:
            memory = prefill(model, random_tokens(1, length + 1)[0], segment_tokens=segment_tokens)
        assert memory is not None and memory.num_tokens == length
        found.append(live.most)
    return found[1] - found[0]


def growths() -> list[int]:
    return [growth(pattern, segment_tokens) for pattern in ("L", "LN") for segment_tokens in (SEGMENT, None)]


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^1$")
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_activations_do_not_grow_with_the_prompt(num_ranks: int) -> None:
    """A rank keeps keys and values of its own tokens, and all of them once they are brought together at the end."""
    for linear, linear_at_once, hybrid, hybrid_at_once in run_on_ranks(num_ranks, growths):
        # But for the tokens themselves.
        assert linear <= 8 * (LONG - SHORT) and linear_at_once > KEYS / num_ranks
        assert KEYS / 2 < hybrid <= (1 / num_ranks + 1) * KEYS
        assert hybrid_at_once > 1.5 * hybrid
