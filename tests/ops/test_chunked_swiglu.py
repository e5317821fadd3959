"""SwiGLU in chunks of tokens equals its definition in float64, with every gradient, and keeps its input alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.ops.chunked.swiglu import chunked_swiglu
from tests.compare import relative_error, worst
from tests.ops.one_node import check_keeps_inputs_alone, check_only_needed_gradients
from tests.unwritten import unwritten_memory_is_nan

SHAPE, WIDTH, INNER, OUT = (3, 37), 6, 20, 5
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}


Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
"""x and the three matrices."""


def make(dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = SHAPE) -> tuple[Inputs, Tensor]:
    """Inputs that require gradients; a gradient of y."""
    generator = torch.Generator().manual_seed(5)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype)

    x, gate, up, down = draw(*shape, WIDTH), draw(INNER, WIDTH), draw(INNER, WIDTH), draw(OUT, INNER)
    inputs = x.requires_grad_(), gate.requires_grad_(), up.requires_grad_(), down.requires_grad_()
    return inputs, draw(*shape, OUT)


def plain(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def with_gradients(y: Tensor, inputs: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
    return [y.detach(), *torch.autograd.grad(y, inputs, upstream.to(y.dtype))]


def errors(inputs: Inputs, upstream: Tensor, chunk_size: int) -> list[float]:
    """Of y and all gradients, beside the definition in float64."""
    x, gate, up, down = (x.detach().double().requires_grad_() for x in inputs)
    exact = (x, gate, up, down)
    got = with_gradients(chunked_swiglu(*inputs, chunk_size), inputs, upstream)
    want = with_gradients(plain(*exact), exact, upstream.double())
    return [relative_error(x, y) for x, y in zip(got, want, strict=True)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("chunk_size", [1, 10, 111, 500])
@unwritten_memory_is_nan()
def test_output_and_gradients_are_those_of_all_tokens_at_once(chunk_size: int, dtype: torch.dtype) -> None:
    assert worst(errors(*make(dtype), chunk_size)) < TOLERANCE[dtype]


def test_sums_over_many_chunks_do_not_round_to_bfloat16() -> None:
    inputs, upstream = make(torch.bfloat16, (4000,))
    one, many = errors(inputs, upstream, 4000), errors(inputs, upstream, 8)
    assert worst(many[2:]) < 3.0 * worst(one[2:])


def test_autocast_casts_as_it_does_for_products() -> None:
    inputs, upstream = make(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = chunked_swiglu(*inputs, 10), plain(*inputs)
    got, want = with_gradients(y, inputs, upstream), with_gradients(expected, inputs, upstream)
    assert [x.dtype for x in got] == [x.dtype for x in want] == [torch.bfloat16, *[torch.float32] * 4]
    assert worst(relative_error(a, b) for a, b in zip(got, want, strict=True)) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (3,), (0, 3)], ids=str)
def test_only_what_requires_a_gradient_gets_one(needed: tuple[int, ...]) -> None:
    inputs, upstream = make()
    check_only_needed_gradients(partial(chunked_swiglu, chunk_size=10), plain, inputs, upstream, needed)


def test_backward_keeps_the_inputs_alone() -> None:
    inputs, _ = make()
    check_keeps_inputs_alone(partial(chunked_swiglu, chunk_size=10), inputs)
