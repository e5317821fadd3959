"""A step in segments of time is the step in one piece: loss and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from longspan.attention.softmax.host_memory import HostMemory
from tests.compare import worst
from tests.models.tiny import each_linear_mixer, random_tokens, tiny_model
from tests.streaming.whole import differences, in_one_piece, in_segments

TOLERANCE = 1e-10


def model_of(mixer: str, **changes: Any) -> Any:
    """Two layers of a mixer, with a head size of its own."""
    values = {"pattern": (mixer,), "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 10}
    return tiny_model(**(values | changes))


def count_copies_to_host_memory(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers in each tensor that is put there from here on."""
    copied: list[int] = []
    put = HostMemory.put

    def counted(self: HostMemory, x: Tensor) -> Tensor:
        copied.append(x.numel())
        return put(self, x)

    monkeypatch.setattr(HostMemory, "put", counted)
    return copied


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^(kda|hgrn2)$")
@pytest.mark.parametrize("mixer", [*each_linear_mixer(), "softmax"])
def test_segments_of_any_length_are_one_piece(mixer: str) -> None:
    model, tokens = model_of(mixer), random_tokens(2, 98)
    want = in_one_piece(model, tokens)
    for segment_tokens in (97, 50, 7):
        errors = differences(in_segments(model, tokens, segment_tokens), want)
        assert worst(errors) < TOLERANCE, (segment_tokens, errors)


PATTERNS: dict[str, dict[str, Any]] = {
    "hybrid": {"pattern": "LLLN", "operator": ("simple_gla", "kda", "mamba2")},
    "window": {"pattern": "LN", "operator": "gated_deltanet", "num_layers": 2, "window": 11},
    "a window of two tokens": {"pattern": "LN", "operator": "gla", "num_layers": 2, "window": 2},
    "tied": {"pattern": "LLN", "operator": "hgrn2", "num_layers": 3, "tie_embeddings": True},
}


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^tied$")
@pytest.mark.parametrize("name", PATTERNS)
def test_a_hybrid_in_segments_is_one_piece(name: str) -> None:
    model, tokens = tiny_model(**PATTERNS[name]), random_tokens(2, 61)
    want = in_one_piece(model, tokens)
    for segment_tokens in (23, 4):
        errors = differences(in_segments(model, tokens, segment_tokens), want)
        assert worst(errors) < TOLERANCE, (segment_tokens, errors)


@pytest.mark.parametrize("mixer", [*each_linear_mixer(("mamba2",)), "softmax"])
def test_segments_shorter_than_the_taps_of_a_convolution_are_one_piece(mixer: str) -> None:
    model, tokens = model_of(mixer, num_layers=1), random_tokens(1, 12)
    want = in_one_piece(model, tokens)
    for segment_tokens in (1, 2):
        errors = differences(in_segments(model, tokens, segment_tokens), want)
        assert worst(errors) < TOLERANCE, (segment_tokens, errors)


# Windows that are shorter than a segment are in `test_a_hybrid_in_segments_is_one_piece`.
@pytest.mark.parametrize("window", [None, pytest.param(5, marks=pytest.mark.slow), 11])
def test_keys_in_host_memory_and_documents_under_a_window_are_one_piece(window: int | None) -> None:
    model, tokens = model_of("softmax", window=window), random_tokens(1, 61)
    for bounds in (None, DOCUMENTS["spanning segments"]):
        want = in_one_piece(model, tokens, bounds)
        for offload in (False, True):
            errors = differences(in_segments(model, tokens, 8, bounds, offload=offload, keep_every=2), want)
            assert worst(errors) < TOLERANCE, (bounds, offload, errors)


@pytest.mark.parametrize("offload", [False, True])
def test_keys_are_in_host_memory_where_that_is_asked_for(offload: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each layer and segment but the last: keys, values and their gradients."""
    copied = count_copies_to_host_memory(monkeypatch)
    in_segments(model_of("softmax"), random_tokens(1, 33), 8, offload=offload)
    num_layers, num_segments, numbers = 2, 4, 8 * 10
    assert copied == ([numbers] * 4 * num_layers * (num_segments - 1) if offload else [])


# Every second state is kept by the keys in host memory above, too.
@pytest.mark.parametrize("keep_every", [*(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3)), 100])
def test_what_is_not_kept_is_found_again(keep_every: int) -> None:
    model, tokens = tiny_model(**PATTERNS["hybrid"]), random_tokens(1, 61)
    want = in_one_piece(model, tokens)
    errors = differences(in_segments(model, tokens, 7, keep_every=keep_every), want)
    assert worst(errors) < TOLERANCE, errors


DOCUMENTS = {
    "spanning segments": (0, 5, 45, 46, 47, 60),
    "ending with segments": (0, 10, 20, 21, 40, 60),
    "one a segment": (0, 10, 20, 30, 40, 50, 60),
    "one": (0, 60),
}


# Ends within segments and at them, in one and the same packing.
@pytest.mark.slow_rows(r"^(spanning segments|one a segment|one)-")
@pytest.mark.parametrize("mixer", [*each_linear_mixer(("mamba2",)), "softmax"])
@pytest.mark.parametrize("name", DOCUMENTS)
def test_packed_documents_go_on_from_segment_to_segment(mixer: str, name: str) -> None:
    model, tokens, bounds = model_of(mixer), random_tokens(1, 61), DOCUMENTS[name]
    want = in_one_piece(model, tokens, bounds)
    for segment_tokens, keep_every in ((10, 1), (10, 3), (7, 1)):
        got = in_segments(model, tokens, segment_tokens, bounds, keep_every=keep_every)
        assert worst(differences(got, want)) < TOLERANCE, (segment_tokens, keep_every)
