"""Rotary embeddings that look at the largest position of a call see that of the whole sequence, on every rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import longspan
from longspan.integrations.transformers import layout_of
from tests.compare import relative_error, worst_of
from tests.integrations.transformers.families import build
from tests.integrations.transformers.reference import PACKED, PLAIN, Batch, Expected, Wide, expected, gradients_of
from tests.ranks import run_on_ranks

# 37 tokens and documents of up to 27 are longer than what these were trained for.
KINDS: dict[str, dict[str, Any]] = {
    "dynamic": {"factor": 2.0, "original_max_position_embeddings": 20},
    "longrope": {
        "factor": 2.0,
        "short_factor": [1.0, 1.0, 1.0],
        "long_factor": [1.0, 2.0, 4.0],
        "original_max_position_embeddings": 20,
    },
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 20},
}


def options_of(kind: str) -> dict[str, Any]:
    rope = {"rope_type": kind, "rope_theta": 1e4, **KINDS[kind]}
    return {"max_position_embeddings": 20 if kind == "dynamic" else 64, "rope_parameters": rope}


def errors(kind: str, batch: Batch, want: Expected) -> dict[str, float]:
    model = longspan.parallelize(build("llama", **options_of(kind)), None, order="contiguous", loss="sum")
    with Wide():
        model(**batch.arguments()).loss.backward()
    longspan.sum_gradients(model)
    return {name: relative_error(g, want.gradients[name]) for name, g in gradients_of(model).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_frequencies_are_of_the_whole_sequence(kind: str) -> None:
    want = expected(build("llama", **options_of(kind)), PLAIN)
    plain = expected(build("llama"), PLAIN)
    assert relative_error(want.logits, plain.logits) > 1e-3, "the case does not reach what it is about"
    for found in run_on_ranks(2, errors, kind, PLAIN, want):
        error, name = worst_of(found)
        assert error < 1e-10, f"{name} is off by {error:.1e}"


def of_packed() -> float:
    """Packed, Transformers takes the largest position of all documents; alone, each its own."""
    model = build("llama", **options_of("dynamic"))
    with Wide(), torch.no_grad():
        model.set_attn_implementation("eager")  # type: ignore[operator]
        want = model(input_ids=PACKED.ids, position_ids=PACKED.positions, use_cache=False).logits
        again = longspan.parallelize(build("llama", **options_of("dynamic")), None)
        got = again(input_ids=PACKED.ids, position_ids=PACKED.positions).logits
    from longspan.integrations.transformers import layout_of

    return relative_error(layout_of(again).gather(got), want)


def test_packed_documents_share_the_frequencies_of_the_longest() -> None:
    assert all(error < 1e-12 for error in run_on_ranks(2, of_packed))


def error_of_later_positions(kind: str, want: torch.Tensor) -> float:
    model: Any = longspan.parallelize(build("llama", **options_of(kind)), None)
    with Wide(), torch.no_grad():
        logits = model(input_ids=PLAIN.ids, position_ids=LATER).logits
    return relative_error(layout_of(model).gather(logits), want)


LATER = torch.arange(30, 67)[None]


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_may_begin_later(kind: str) -> None:
    # Frequencies of longer sequences stay with a model.
    model, other = (build("llama", **options_of(kind)) for _ in range(2))
    with Wide(), torch.no_grad():
        want = model(input_ids=PLAIN.ids, position_ids=LATER, use_cache=False).logits
        earlier = other(input_ids=PLAIN.ids, use_cache=False).logits
    assert kind == "longrope" or relative_error(want, earlier) > 1e-3, "the case does not reach what it is about"
    assert all(error < 1e-10 for error in run_on_ranks(2, error_of_later_positions, kind, want))
