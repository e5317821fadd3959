"""A prompt that is read in segments of time leaves the cache that it leaves when it is read at once."""

from __future__ import annotations

import pytest

from tests.integrations.transformers.prompts import WITH_CACHE, check


@pytest.mark.parametrize("name", ["qwen3_next", "recurrent_gemma"])
def test_segments_leave_the_same_cache(name: str) -> None:
    """Segments shorter than windows; the last one shorter than the others."""
    check(name, 2, "zigzag", "last", segment_tokens=8)


def test_segments_with_frequencies_that_look_at_the_longest_position() -> None:
    check("llama", 2, "contiguous", "all", "dynamic", segment_tokens=8)


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_CACHE)
def test_segments_in_every_family(name: str) -> None:
    check(name, 2, "zigzag", "last", segment_tokens=8)
    check(name, 2, "contiguous", "all", segment_tokens=3)
    check(name, 1, "contiguous", "last", segment_tokens=1)
