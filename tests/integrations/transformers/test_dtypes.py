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
from tests.integrations.transformers.reference import PLAIN, Batch, Expected, batch, expected, gradients_of
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
BATCHES = [batch(seed=seed) for seed in range(3, 10)]
DENSE = [name for name in FAMILIES if name not in ROUTED]


def prepared(name: str, how: str) -> nn.Module:
    return build(name).to(torch.bfloat16 if how == "bfloat16" else torch.float32)


def run(model: nn.Module, how: str, batch: Batch, **given: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        out = model(**batch.arguments(), **given)
    out.loss.backward()
    gradients = gradients_of(model)
    model.zero_grad()
    return out.loss.detach(), out.logits.detach(), gradients


def over_ranks(name: str, how: str, batches: list[Batch]) -> list[tuple[Tensor, Tensor, dict[str, Tensor]]]:
    model = longspan.parallelize(prepared(name, how), None, loss="sum")
    found = []
    for of_step in batches:
        loss, logits, gradients = run(model, how, of_step)
        wide = {key: gradient.double() for key, gradient in gradients.items()}
        for value in (loss, *wide.values()):
            dist.all_reduce(value)
        found.append((loss, layout_of(model).gather(logits), wide))
    return found


def check(name: str, how: str) -> None:
    """The errors of one batch are a matter of luck, ours up to twice Transformers' or half of them; over batches they are not."""
    exact, plain = build(name), prepared(name, how)
    wants = [expected(exact, of_step) for of_step in BATCHES]
    owns = [run(plain, how, of_step, use_cache=False) for of_step in BATCHES]
    for found in run_on_ranks(2, over_ranks, name, how, BATCHES):
        of_logits, of_gradients = [], []
        for (loss, logits, gradients), want, (_, own_logits, own_gradients) in zip(found, wants, owns, strict=True):
            assert relative_error(loss, want.loss) < 0.02
            of_logits.append(relative_error(logits, want.logits) / relative_error(own_logits, want.logits))
            of_gradients.append(median_error(gradients, want) / median_error(own_gradients, want))
        assert statistics.median(of_logits) < 1.5, f"errors of logits are {of_logits} times those of Transformers"
        assert statistics.median(of_gradients) < 1.5, (
            f"errors of gradients are {of_gradients} times those of Transformers"
        )


def median_error(gradients: dict[str, Tensor], want: Expected) -> float:
    assert gradients.keys() == want.gradients.keys()
    return statistics.median(relative_error(gradients[key], want.gradients[key]) for key in gradients)


@pytest.mark.slow_rows(r"bamba-bfloat16", r"^olmo_hybrid")
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
    ((loss, _, gradients),) = over_ranks(name, how, [PLAIN])
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients.values())
    return float(loss)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
@pytest.mark.parametrize("name", sorted(ROUTED))
def test_routed_families_run_in_reduced_precision(name: str, how: str) -> None:
    want = float(expected(build(name), PLAIN).loss)
    for loss in run_on_ranks(2, finite, name, how):
        assert abs(loss - want) < 0.05 * want
