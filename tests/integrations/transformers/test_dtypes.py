"""bfloat16 weights and autocast: no further from float64 than Transformers' own code is."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import longspan
from longspan.integrations.transformers import layout_of
from tests.compare import relative_error
from tests.integrations.transformers.families import FAMILIES, build
from tests.integrations.transformers.reference import PLAIN, expected, gradients_of
from tests.ranks import run_on_ranks

# Where a token's experts are nearly tied, rounding sends it to another one, on either side.
ROUTED = {
    "gpt_oss",
    "granitemoehybrid",
    "jamba",
    "kimi_linear",
    "lfm2_moe",
    "llama4",
    "minimax",
    "nemotron_h",
    "qwen3_5_moe",
}
ROUTED |= {"bailing_hybrid", "deepseek_v3", "qwen3_next"}
DENSE = [name for name in FAMILIES if name not in ROUTED]


def prepared(name: str, how: str) -> nn.Module:
    return build(name).to(torch.bfloat16 if how == "bfloat16" else torch.float32)


def run(model: nn.Module, how: str, **given: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        out = model(**PLAIN.arguments(), **given)
    out.loss.backward()
    return out.loss.detach(), out.logits.detach(), gradients_of(model)


def over_ranks(name: str, how: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    model = longspan.parallelize(prepared(name, how), None, loss="sum")
    loss, logits, gradients = run(model, how)
    wide = {key: gradient.double() for key, gradient in gradients.items()}
    for value in (loss, *wide.values()):
        dist.all_reduce(value)
    return loss, layout_of(model).gather(logits), wide


def check(name: str, how: str) -> None:
    want = expected(build(name), PLAIN)
    _, logits, gradients = run(prepared(name, how), how, use_cache=False)
    own = relative_error(logits, want.logits)
    own_gradients = statistics.median(relative_error(gradients[key], want.gradients[key]) for key in want.gradients)
    for loss, got, got_gradients in run_on_ranks(2, over_ranks, name, how):
        assert relative_error(loss, want.loss) < 0.02
        error = relative_error(got, want.logits)
        assert error < 2.0 * own, f"logits are off by {error:.1e}, Transformers' own by {own:.1e}"
        median = statistics.median(relative_error(got_gradients[key], want.gradients[key]) for key in want.gradients)
        # The delta rules differ by up to twice, either way: what is rounded before a product is not the same.
        assert median < 2.5 * own_gradients, (
            f"gradients are off by {median:.1e}, Transformers' own by {own_gradients:.1e}"
        )


@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
@pytest.mark.parametrize("name", ["olmo_hybrid", "bamba"])
def test_reduced_precision_is_as_transformers_has_it(name: str, how: str) -> None:
    check(name, how)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
@pytest.mark.parametrize("name", [name for name in DENSE if name not in ("olmo_hybrid", "bamba")])
def test_reduced_precision_of_every_family(name: str, how: str) -> None:
    check(name, how)


def finite(name: str, how: str) -> float:
    loss, _, gradients = over_ranks(name, how)
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients.values())
    return float(loss)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
@pytest.mark.parametrize("name", sorted(ROUTED))
def test_routed_families_run_in_reduced_precision(name: str, how: str) -> None:
    want = float(expected(build(name), PLAIN).loss)
    for loss in run_on_ranks(2, finite, name, how):
        assert abs(loss - want) < 0.05 * want
