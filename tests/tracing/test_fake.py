"""Tensors without values: shapes and dtypes are those of the real call, forward and backward, and nothing is sent."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from longspan import SequenceLayout
from longspan.models import LinearLlama3, LinearLlama3Config
from tests.models.tiny import random_tokens, tiny_model
from tests.tracing.calls import CALLS, inputs_of, local_inputs, results

Signature = list[tuple[torch.Size, torch.dtype]]


def signature(found: list[Tensor]) -> Signature:
    return [(x.shape, x.dtype) for x in found]


def fakes_of(mode: FakeTensorMode, tensors: list[Tensor]) -> list[Tensor]:
    fakes = [mode.from_tensor(x) for x in tensors]
    return [fake.detach().requires_grad_(x.requires_grad) for fake, x in zip(fakes, tensors, strict=True)]


def expected_of(name: str, dtype: torch.dtype, documents: list[int] | None) -> tuple[list[Tensor], Signature]:
    call = CALLS[name]
    wide = ("state", "g", "beta", "log_decay", "dt", "A")
    tensors = [
        x.detach().to(torch.float32 if key in wide and name != "convolution" else dtype).requires_grad_(x.requires_grad)
        for key, x in zip(call.shapes, inputs_of(call, 70, documents), strict=True)
    ]
    layout = None if documents is None else SequenceLayout.local(70, documents)
    return tensors, signature(results(call.function, layout, tensors))


# Each dtype and each layout is in the other two of four rows.
@pytest.mark.slow_rows(r"-dtype0-documents1$", r"-dtype1-None$")
# Others of their kind run in make test.
@pytest.mark.slow_rows(
    r"^(comba|gla_with_bonus|gated_delta_rule|delta_rule|retention|normalized|hgrn2|write and read)-dtype0-None$",
    r"^(features|kda|mamba2|gated_delta_product|dplr_delta_rule)-dtype1-documents1$",
)
@pytest.mark.parametrize("documents", [None, [0, 11, 40, 70]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CALLS)
def test_shapes_and_dtypes_are_right(name: str, dtype: torch.dtype, documents: list[int] | None) -> None:
    call = CALLS[name]
    tensors, expected = expected_of(name, dtype, documents)
    layout = None if documents is None else SequenceLayout.local(70, documents)
    with FakeTensorMode() as mode:
        fakes = fakes_of(mode, tensors)
        assert signature(results(call.function, layout, fakes)) == expected
    metas = [x.detach().to("meta").requires_grad_(x.requires_grad) for x in tensors]
    found = results(call.function, layout, metas)
    assert signature(found) == expected
    assert all(x.is_meta for x in found)
    # The layout serves real calls as before.
    assert signature(results(call.function, layout, tensors)) == expected


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^(?!simple_gla|softmax|mamba2|token shift).*-zigzag$")
@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
@pytest.mark.parametrize("name", CALLS)
def test_any_rank_of_a_layout_has_shapes_without_a_group(name: str, order: Any) -> None:
    call = CALLS[name]
    tensors = inputs_of(call, 70, [0, 11, 40, 70])
    layout = SequenceLayout.for_rank(70, 4, 1, order, [0, 11, 40, 70])
    own = local_inputs(call, tensors, layout)
    with FakeTensorMode() as mode:
        fakes = fakes_of(mode, own)
        found = signature(results(call.function, layout, fakes))
    outputs = call.function(SequenceLayout.local(70, [0, 11, 40, 70]), *tensors)
    shares = [layout.shard(x).shape if x.dim() > 1 and x.shape[1] == 70 else x.shape for x in outputs]
    leaves = [x for x in own if x.requires_grad]
    assert [shape for shape, _ in found] == [*shares, *(x.shape for x in leaves)]


def test_gathered_tensors_have_the_whole_length() -> None:
    layout = SequenceLayout.for_rank(70, 4, 1)
    x = torch.empty(2, layout.num_local_tokens, 3, device="meta", requires_grad=True)
    y = layout.gather(x)
    assert y.shape == (2, 70, 3)
    (grad,) = torch.autograd.grad(y, x, torch.empty_like(y))
    assert grad.shape == x.shape


# Each operator is called so above.
@pytest.mark.slow_rows(r"^(mamba2|hgrn2|based|retention)$")
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^gated_deltanet$")
@pytest.mark.parametrize("operator", ["simple_gla", "gated_deltanet", "mamba2", "hgrn2", "based", "retention"])
def test_a_model_is_planned_without_values(operator: str) -> None:
    layout = SequenceLayout.local(70, [0, 11, 40, 70])
    config = LinearLlama3Config(
        vocab_size=29, dim=16, num_layers=4, num_heads=4, num_kv_heads=2, hidden_dim=24, operator=operator
    )
    with FakeTensorMode():
        model = LinearLlama3(config)
        tokens = torch.zeros(1, 70, dtype=torch.int64)
        logits = model(tokens, layout=layout)
        assert logits.shape == (1, 70, 29)
        logits.sum().backward()
        assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
    real = LinearLlama3(config)
    assert torch.isfinite(real(random_tokens(1, 70), layout=layout)).all()


@pytest.mark.slow_rows(r"mamba2", r"kda|hgrn2")
@pytest.mark.parametrize("operator", ["simple_gla", "kda", "mamba2", "hgrn2"])
def test_a_model_is_exported(operator: str) -> None:
    model = tiny_model(operator=operator, pattern="LN", num_layers=2).eval()
    tokens = random_tokens(2, 70)
    length = torch.export.Dim("length", min=2, max=4096)
    program = torch.export.export(model, (tokens,), dynamic_shapes=({1: length},))
    for size in (70, 33):
        tokens = random_tokens(2, size, seed=size)
        torch.testing.assert_close(program.module()(tokens), model(tokens), rtol=1e-10, atol=1e-10)
