"""A step in segments of time is the step in one piece: loss and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longspan import stream
from longspan.models import MIXERS
from tests.compare import worst
from tests.models.tiny import each_linear_mixer, random_tokens, tiny_model
from tests.streaming.whole import differences, in_one_piece, in_segments

TOLERANCE = 1e-10


def model_of(mixer: str, **changes: Any) -> Any:
    """Two layers of a mixer, with a head size of its own."""
    values = {"pattern": (mixer,), "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 10}
    return tiny_model(**(values | changes))


@pytest.mark.parametrize("mixer", [*each_linear_mixer(), "softmax"])
def test_segments_of_any_length_are_one_piece(mixer: str) -> None:
    model, tokens = model_of(mixer), random_tokens(2, 98)
    want = in_one_piece(model, tokens)
    for segment_tokens in (97, 50, 33, 7):
        errors = differences(in_segments(model, tokens, segment_tokens), want)
        assert worst(errors) < TOLERANCE, (segment_tokens, errors)
