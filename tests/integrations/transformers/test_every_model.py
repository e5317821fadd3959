"""Every causal language model of the installed Transformers: it is right over ranks, or `parallelize` refuses it by name."""

from __future__ import annotations

import re

import pytest

from tests.integrations.transformers.every_model import classes, is_told, outcome_of

KINDS = list(classes())
FEWEST_TOLD = 0.9
"""The part of all models that the sizes must fit, so that something is told of them."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_right_or_refused(kind: str) -> None:
    found = outcome_of(kind)
    assert found.outcome not in ("wrong", "error"), f"{classes()[kind][1]}: {found.outcome}, {found.about}"
    if found.outcome == "refused":
        assert re.search(r"[A-Z]\w+", found.about), "a refusal names the class"


@pytest.mark.slow
def test_most_models_are_small_enough_to_be_told() -> None:
    silent = [kind for kind in KINDS if not is_told(kind)]
    assert len(silent) <= (1 - FEWEST_TOLD) * len(KINDS), f"nothing is known of {', '.join(silent)}"
