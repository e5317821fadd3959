"""A parallelized model under `torch.compile`: the same numbers, one break of the graph at each mixer."""

from __future__ import annotations

import pytest
import torch

import longspan
from tests.compare import relative_error, worst_of
from tests.integrations.transformers.families import build
from tests.integrations.transformers.reference import PACKED, PLAIN, gradients_of
from tests.ranks import run_on_ranks


def compiled(name: str) -> dict[str, float]:
    torch._dynamo.reset()
    model = longspan.parallelize(build(name).float(), None)
    want = []
    for batch in (PLAIN, PACKED):
        model(**batch.arguments()).loss.backward()
        want.append(gradients_of(model))
        model.zero_grad()
    fast = torch.compile(model, backend="aot_eager")
    errors: dict[str, float] = {}
    for batch, expected in zip((PLAIN, PACKED), want, strict=True):
        fast(**batch.arguments()).loss.backward()
        errors |= {key: relative_error(gradient, expected[key], 1e-6) for key, gradient in gradients_of(model).items()}
        model.zero_grad()
    torch._dynamo.reset()
    return errors


# What the compiler itself warns of where a graph breaks.
@pytest.mark.slow_rows(r"^llama")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize(
    "name",
    [
        "llama",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("qwen3_5", "bamba", "minimax", "jamba", "mamba2", "lfm2", "kimi_linear")
        ),
    ],
)
def test_compiled_models_give_the_same(name: str) -> None:
    for errors in run_on_ranks(2, compiled, name, timeout=240.0):
        error, what = worst_of(errors)
        assert error < 1e-4, f"{what} is off by {error:.1e}"
