"""The model under `torch.compile`: the same loss and gradients, in one graph on one device, for all lengths, and over ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import longspan
from longspan import SequenceLayout
from longspan.data.packing import PackedBatch
from longspan.train.loss import loss_sum
from tests.compare import relative_error, worst
from tests.models.tiny import random_tokens, tiny_model
from tests.ranks import run_on_ranks
from tests.tracing.test_compile import documents_of, num_compiled, pytestmark  # noqa: F401

LENGTHS = (64, 100, 77)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gradients(model: Any, called: Any, tokens: Tensor, layout: SequenceLayout | None) -> list[Tensor]:
    loss = loss_sum(called, PackedBatch.of(tokens), layout)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.slow_rows(r"^simple_gla-True")
@pytest.mark.parametrize("packed", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize(
    "operator", ["simple_gla", *(pytest.param(x, marks=pytest.mark.slow) for x in ("kda", "rwkv7"))]
)
def test_one_graph_serves_all_lengths(operator: str, packed: bool) -> None:
    torch._dynamo.utils.counters.clear()
    model = tiny_model(operator=operator, feed_forward_chunk=16 if packed else 0)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for number, length in enumerate(LENGTHS):
        layout = SequenceLayout.local(length, documents_of(length, 4 + number) if packed else None)
        tokens = random_tokens(1 if packed else 2, length + 1, seed=number)
        expected = gradients(model, model, tokens, layout)
        got = gradients(model, compiled, tokens, layout)
        assert worst([relative_error(x, y) for x, y in zip(got, expected, strict=True)]) < 1e-10
        assert num_compiled() <= 2


def on_ranks(operator: str) -> float:
    torch._dynamo.reset()
    model = tiny_model(operator=operator, feed_forward_chunk=16)
    longspan.parallelize(model, None)
    compiled = torch.compile(model, backend="aot_eager")
    errors = []
    for number, length in enumerate(LENGTHS):
        layout = SequenceLayout(length, order="zigzag")
        tokens = random_tokens(2, length + 1, seed=number)
        got = gradients(model, compiled, tokens, layout)
        expected = gradients(model, model, tokens, layout)
        errors += [relative_error(x, y) for x, y in zip(got, expected, strict=True)]
    torch._dynamo.reset()
    return worst(errors)


@pytest.mark.slow
@pytest.mark.parametrize("operator", ["simple_gla", "gated_deltanet"])
def test_ranks_give_the_same(operator: str) -> None:
    assert worst(run_on_ranks(2, on_ranks, operator, timeout=300.0)) < 1e-10
