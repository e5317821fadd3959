"""A prompt that is read in segments of time leaves the cache that it leaves when it is read at once."""

from __future__ import annotations

from typing import Any

import pytest

import longspan
from longspan.streaming import SegmentDone
from tests.compare import relative_error
from tests.integrations.transformers.families import build
from tests.integrations.transformers.prompts import WITH_CACHE, check, prompt
from tests.ranks import run_on_ranks


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^qwen3_next$")
@pytest.mark.parametrize("name", ["qwen3_next", "recurrent_gemma"])
def test_segments_leave_the_same_cache(name: str) -> None:
    """Segments shorter than windows; the last one shorter than the others."""
    check(name, 2, "zigzag", "last", segment_tokens=8)


def test_segments_with_frequencies_that_look_at_the_longest_position() -> None:
    check("llama", 2, "contiguous", "all", "dynamic", segment_tokens=8)


def heard_of_a_prompt() -> list[SegmentDone]:
    """The segments of a prompt, of which one between two is given up first."""
    model: Any = longspan.parallelize(build("qwen3_next"), None)

    def stop(done: SegmentDone) -> None:
        if done.segment == 1:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        longspan.prefill(model, prompt(), segment_tokens=12, between=stop)
    want = longspan.prefill(model, prompt()).logits
    heard: list[SegmentDone] = []
    found = longspan.prefill(model, prompt(), segment_tokens=12, between=heard.append).logits
    assert (found is None) == (want is None)
    assert found is None or want is None or relative_error(found, want) < 1e-5
    return heard


def test_a_prompt_is_heard_of_between_its_segments_and_may_end_there() -> None:
    for heard in run_on_ranks(2, heard_of_a_prompt):
        assert heard == [SegmentDone("forward", segment, 3) for segment in range(3)]


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_CACHE)
def test_segments_in_every_family(name: str) -> None:
    check(name, 2, "zigzag", "last", segment_tokens=8)
    check(name, 2, "contiguous", "all", segment_tokens=3)
    check(name, 1, "contiguous", "last", segment_tokens=1)
