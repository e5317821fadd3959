"""Segments of time that are split over ranks are one process's whole sequence: loss and every gradient, on every rank."""

from __future__ import annotations

from typing import Any

import pytest

from longspan import SequenceLayout, parallelize, stream, sum_gradients, sum_over_ranks
from tests.compare import worst
from tests.models.tiny import QUICK, each_linear_mixer, random_tokens, tiny_model
from tests.ranks import run_on_ranks
from tests.streaming.whole import differences, gradients_of, in_one_piece, labels_of

TOLERANCE = 1e-10


def differences_on_rank(
    changes: dict[str, Any], order: Any, documents: Any, segment_tokens: int, keep_every: int, **shares: Any
) -> dict[str, float]:
    tokens = random_tokens(1 if documents else 2, 62)
    want = in_one_piece(tiny_model(**changes), tokens, documents)
    model = parallelize(tiny_model(**changes), None)
    layout = SequenceLayout(61, order=order, documents=documents, **shares)
    streamed = stream(model, segment_tokens, keep_every=keep_every)
    loss = streamed.forward_backward(tokens[:, :-1], labels_of(tokens, documents), layout)
    sum_gradients(model)
    return differences({"loss": sum_over_ranks(loss), **gradients_of(model)}, want)


def assert_equal(num_ranks: int, *arguments: Any) -> None:
    for errors in run_on_ranks(num_ranks, differences_on_rank, *arguments):
        assert worst(errors) < TOLERANCE, errors


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^2-mamba2$")
@pytest.mark.parametrize("mixer", [*each_linear_mixer(("mamba2", "kda")), "softmax"])
@pytest.mark.parametrize(
    "num_ranks", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def test_segments_over_ranks_are_one_piece(mixer: str, num_ranks: int) -> None:
    changes = {"pattern": (mixer,), "num_layers": 2}
    assert_equal(num_ranks, changes, "zigzag", None, 20, 1)
    assert_equal(num_ranks, changes, "contiguous", None, 7, 2)


@pytest.mark.slow_rows(r"^2-mamba2$")
@pytest.mark.parametrize("mixer", [*each_linear_mixer(("mamba2",)), "softmax"])
@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_documents_over_segments_and_ranks_are_one_piece(mixer: str, num_ranks: int) -> None:
    changes = {"pattern": (mixer,), "num_layers": 2}
    for order in ("zigzag", "contiguous"):
        assert_equal(num_ranks, changes, order, (0, 5, 20, 21, 52, 61), 10, 1)


@pytest.mark.slow
def test_a_hybrid_over_four_ranks_is_one_piece() -> None:
    changes = {"pattern": "LLLN", "operator": ("simple_gla", "kda", "mamba2"), "window": 9}
    assert_equal(4, changes, "zigzag", None, 16, 1)


def test_a_last_segment_shorter_than_the_ranks_joins_the_one_before() -> None:
    # 61 tokens in segments of 20 leave one.
    assert_equal(3, {"pattern": QUICK[:2], "num_layers": 2}, "contiguous", None, 20, 1)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("order", ["zigzag", "contiguous"])
def test_segments_of_a_token_for_each_rank_are_one_piece(num_ranks: int, order: str) -> None:
    """The least that works: fewer tokens than a convolution has taps, and in zigzag order a run without a token for each rank."""
    changes = {"pattern": "LN", "operator": "mamba2", "num_layers": 2, "window": 9}
    assert_equal(num_ranks, changes, order, None, num_ranks, 4)


def uneven_on_rank() -> dict[str, float]:
    changes = {"pattern": "LN", "operator": "mamba2", "num_layers": 2, "window": 9}
    documents, shares = (0, 5, 20, 21, 52, 61), {"weights": [3.0, 1.0], "rank_order": [1, 0]}
    return differences_on_rank(changes, "zigzag", documents, 10, 1, **shares)


def test_ranks_may_hold_uneven_shares_of_every_segment() -> None:
    for errors in run_on_ranks(2, uneven_on_rank):
        assert worst(errors) < TOLERANCE, errors


LENGTH, SEGMENT = 25, 7
ANYWHERE: dict[str, dict[str, Any]] = {
    "mamba2 and softmax": {"pattern": "LN", "operator": "mamba2", "num_layers": 2},
    "in a window": {"pattern": "LN", "operator": "kda", "num_layers": 2, "window": 4},
    "a window longer than segments": {"pattern": ("chela", "softmax"), "num_layers": 2, "window": 10},
}


def worst_with_a_boundary_anywhere(changes: dict[str, Any], order: Any) -> dict[str, float]:
    """Two documents with a boundary behind each token, and three with a short one before it."""
    found, tokens = {}, random_tokens(1, LENGTH + 1)
    model = parallelize(tiny_model(**changes), None)
    for bound in range(1, LENGTH):
        for documents in {(0, bound, LENGTH), tuple(sorted({0, max(bound - 2, 0), bound, LENGTH}))}:
            want = in_one_piece(tiny_model(**changes), tokens, documents)
            model.zero_grad(set_to_none=True)
            layout = SequenceLayout(LENGTH, order=order, documents=documents)
            loss = stream(model, SEGMENT).forward_backward(tokens[:, :-1], labels_of(tokens, documents), layout)
            sum_gradients(model)
            got = {"loss": sum_over_ranks(loss), **gradients_of(model)}
            found[str(documents)] = worst(differences(got, want))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize("layers", ANYWHERE)
def test_a_document_may_end_behind_any_token(layers: str, num_ranks: int, order: Any) -> None:
    for errors in run_on_ranks(num_ranks, worst_with_a_boundary_anywhere, ANYWHERE[layers], order):
        assert worst(errors) < TOLERANCE, errors
