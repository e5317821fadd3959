"""Every causal language model of the installed Transformers: it is right over ranks, or `parallelize` refuses it by name."""

from __future__ import annotations

import re

import pytest

from tests.integrations.transformers.every_model import Found, classes, outcome_of

KINDS = list(classes())
FEWEST_TOLD = 0.9
"""The part of all models that the sizes must fit, so that something is told of them."""

_told: dict[str, bool] = {}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_right_or_refused(kind: str) -> None:
    found: Found = outcome_of(kind)
    _told[kind] = found.outcome != "not small"
    assert found.outcome not in ("wrong", "error"), f"{classes()[kind][1]}: {found.outcome}, {found.about}"
    if found.outcome == "refused":
        assert re.search(r"[A-Z]\w+", found.about), "a refusal names the class"


@pytest.mark.slow
def test_most_models_are_small_enough_to_be_told() -> None:
    silent = sorted(kind for kind, is_told in _told.items() if not is_told)
    assert len(silent) <= (1 - FEWEST_TOLD) * max(len(_told), 1), f"nothing is known of {', '.join(silent)}"
