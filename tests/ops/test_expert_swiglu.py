"""SwiGLU by chosen experts equals its definition, token by token in float64, with every gradient, however unequal their shares."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode

import longspan.ops.experts.swiglu as module
from longspan.ops.experts.dispatch import Dispatch
from longspan.ops.experts.grouped import Groups, takes_one_kernel
from longspan.ops.experts.swiglu import expert_swiglu
from tests.attention.test_host_waits import as_if_with_values, waits
from tests.compare import relative_error, worst
from tests.ops.one_node import check_keeps_inputs_alone, check_only_needed_gradients
from tests.tracing.test_compile import pytestmark  # noqa: F401
from tests.unwritten import unwritten_memory_is_nan

NUM_TOKENS, WIDTH, INNER, OUT, NUM_EXPERTS = 37, 8, 16, 24, 5
TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 3e-2, torch.float16: 5e-3}

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""x, chosen, weights, and the three stacks of matrices."""


def make(
    dtype: torch.dtype = torch.float64, per_token: int = 2, num_tokens: int = NUM_TOKENS, idle: tuple[int, ...] = (3,)
) -> tuple[Inputs, Tensor]:
    """Inputs whose floating ones require gradients, and a gradient of the output. No token chooses the experts `idle`."""
    generator = torch.Generator().manual_seed(5)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype)

    scores = torch.rand(num_tokens, NUM_EXPERTS, generator=generator)
    # The first expert has most.
    scores[:, 0] += 0.5
    scores[:, list(idle)] = -1.0
    chosen = scores.topk(per_token, dim=-1).indices
    weights = torch.rand(num_tokens, per_token, generator=generator, dtype=torch.float64)
    weights = weights.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    x, gate, up = draw(num_tokens, WIDTH), draw(NUM_EXPERTS, INNER, WIDTH), draw(NUM_EXPERTS, INNER, WIDTH)
    down = draw(NUM_EXPERTS, OUT, INNER)
    inputs = x.requires_grad_(), chosen, weights, gate.requires_grad_(), up.requires_grad_(), down.requires_grad_()
    return inputs, draw(num_tokens, OUT)


def plain(x: Tensor, chosen: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The definition: each token by itself."""
    rows = []
    for token in range(len(x)):
        parts = []
        for choice, e in enumerate(chosen[token].tolist()):
            inner = F.silu(gate[e] @ x[token]) * (up[e] @ x[token])
            parts.append(weights[token, choice] * (down[e] @ inner))
        rows.append(torch.stack(parts).sum(0))
    return torch.stack(rows)


def floating(inputs: Inputs) -> list[Tensor]:
    return [x for x in inputs if x.is_floating_point()]


def with_gradients(y: Tensor, inputs: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
    return [y.detach(), *torch.autograd.grad(y, inputs, upstream.to(y.dtype))]


def errors(inputs: Inputs, upstream: Tensor, chunk_size: int = 0) -> list[float]:
    """Of y and all gradients, beside the definition in float64."""
    x, chosen, *others = inputs
    exact = [given.detach().double().requires_grad_() for given in (x, *others)]
    got = with_gradients(expert_swiglu(*inputs, chunk_size), floating(inputs), upstream)
    want = with_gradients(plain(exact[0], chosen, *exact[1:]), exact, upstream.double())
    return [relative_error(a, b) for a, b in zip(got, want, strict=True)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("chunk_size", [0, 1, 10, 37, 500])
@unwritten_memory_is_nan()
def test_output_and_gradients_are_those_of_each_token_alone(chunk_size: int, dtype: torch.dtype) -> None:
    assert worst(errors(*make(dtype), chunk_size)) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("per_token", "num_tokens", "idle"),
    [(1, 37, (3,)), (5, 37, ()), (1, 1, (1, 2, 3, 4)), (1, 20, (1, 2, 3, 4)), (4, 3, (0,))],
    ids=["one of five", "all", "one token", "one expert for all", "more than there are tokens"],
)
@unwritten_memory_is_nan()
def test_no_token_is_dropped_however_few_experts_are_chosen(
    per_token: int, num_tokens: int, idle: tuple[int, ...]
) -> None:
    for chunk_size in (0, 7):
        assert worst(errors(*make(per_token=per_token, num_tokens=num_tokens, idle=idle), chunk_size)) < 1e-13


def test_an_expert_without_a_token_has_gradients_of_zero() -> None:
    inputs, upstream = make()
    _, _, _, *of_matrices = with_gradients(expert_swiglu(*inputs), floating(inputs), upstream)
    for grad in of_matrices:
        assert torch.equal(grad[3], torch.zeros_like(grad[3])) and grad[0].abs().min() > 0


@pytest.fixture
def _in_one_kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a GPU that has one: PyTorch's `grouped_mm` takes what the loop would."""
    monkeypatch.setattr(module, "takes_one_kernel", lambda x, *widths: True)
    yield


@pytest.mark.usefixtures("_in_one_kernel")
@pytest.mark.parametrize("chunk_size", [0, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_grouped_products_of_pytorch_give_the_same(dtype: torch.dtype, chunk_size: int) -> None:
    inputs, upstream = make(dtype)
    chosen = inputs[1]
    assert Dispatch.of(chosen, NUM_EXPERTS, in_one_kernel=True).groups.bounds is None
    assert worst(errors(inputs, upstream, chunk_size)) < TOLERANCE[dtype]


def test_one_kernel_is_taken_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def on(*capability: int) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    on(9, 0)
    with FakeTensorMode():
        rows, none = (torch.empty(n, 16, dtype=torch.bfloat16, device="cuda") for n in (3, 0))
        assert takes_one_kernel(rows, 16, 24)
        assert not takes_one_kernel(rows, 16, 20)
        assert not takes_one_kernel(none, 16, 24)
        assert not takes_one_kernel(rows.float(), 16, 24)
        assert not takes_one_kernel(rows.cpu(), 16, 24)
        on(10, 3)
        assert takes_one_kernel(rows, 16, 24)
        for capability in ((8, 0), (8, 9), (12, 0)):
            on(*capability)
            assert not takes_one_kernel(rows, 16, 24)


@pytest.mark.usefixtures("_in_one_kernel")
@pytest.mark.parametrize("chunk_size", [0, 10])
def test_with_one_kernel_the_host_waits_for_no_device(monkeypatch: pytest.MonkeyPatch, chunk_size: int) -> None:
    inputs, upstream = make(torch.bfloat16)
    device = cast(Inputs, tuple(x.detach().to("meta").requires_grad_(x.requires_grad) for x in inputs))
    grad = upstream.to("meta")
    with as_if_with_values(monkeypatch), waits() as found:
        y = expert_swiglu(*device, chunk_size)
        torch.autograd.grad(y, floating(device), grad)
    assert found == []


def test_rows_are_in_order_of_their_experts_and_tokens() -> None:
    chosen = torch.tensor([[2, 0], [0, 1], [2, 1]])
    dispatch = Dispatch.of(chosen, 4, in_one_kernel=False)
    assert dispatch.token.tolist() == [0, 1, 1, 2, 0, 2]
    assert dispatch.groups.ends.tolist() == [2, 4, 6, 6]
    assert dispatch.groups.bounds == (0, 2, 4, 6, 6)
    x = torch.arange(3.0)[:, None]
    assert torch.equal(dispatch.sums_of_tokens(dispatch.rows_of_tokens(x)), 2 * x)


@pytest.mark.parametrize("bounds", [(0, 3, 3, 7), None], ids=["loop", "one kernel"])
def test_products_of_groups_are_those_of_their_runs(bounds: tuple[int, ...] | None) -> None:
    groups = Groups(torch.tensor([3, 3, 7], dtype=torch.int32), bounds)
    rows, matrices, right = torch.randn(7, 8), torch.randn(3, 8, 4), torch.randn(7, 4)
    want = torch.cat([rows[:3] @ matrices[0], rows[3:] @ matrices[2]])
    assert relative_error(groups.times(rows, matrices), want) < 1e-6
    gram = torch.stack([rows[:3].t() @ right[:3], torch.zeros(8, 4), rows[3:].t() @ right[3:]])
    assert relative_error(groups.gram(rows, right), gram) < 1e-6
    total = torch.ones(3, 8, 4, dtype=torch.float64)
    groups.add_gram(total, rows, right)
    assert relative_error(total, gram + 1) < 1e-6


def test_sums_over_many_chunks_do_not_round_to_bfloat16() -> None:
    inputs, upstream = make(torch.bfloat16, num_tokens=600)
    one, many = errors(inputs, upstream), errors(inputs, upstream, 8)
    assert worst(many[3:]) < 3.0 * worst(one[3:])


@pytest.mark.parametrize("chunk_size", [0, 10])
def test_autocast_casts_as_it_does_for_products(chunk_size: int) -> None:
    inputs, upstream = make(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = expert_swiglu(*inputs, chunk_size)
    got = with_gradients(y, floating(inputs), upstream)
    want = with_gradients(plain(*inputs), floating(inputs), upstream)
    assert [x.dtype for x in got] == [torch.bfloat16, *[torch.float32] * 5]
    assert worst(relative_error(a, b) for a, b in zip(got, want, strict=True)) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("chunk_size", [0, 10])
@pytest.mark.parametrize("needed", [(0,), (2,), (3,), (5,), (0, 4)], ids=str)
def test_only_what_requires_a_gradient_gets_one(needed: tuple[int, ...], chunk_size: int) -> None:
    inputs, upstream = make()
    check_only_needed_gradients(partial(expert_swiglu, chunk_size=chunk_size), plain, inputs, upstream, needed)


def test_backward_in_chunks_keeps_the_inputs_alone() -> None:
    inputs, _ = make()
    check_keeps_inputs_alone(partial(expert_swiglu, chunk_size=10), inputs)


def test_to_a_compiler_it_is_one_operator_with_the_same_gradients() -> None:
    torch._dynamo.reset()
    inputs, upstream = make()
    for chunk_size in (0, 10):
        compiled = torch.compile(expert_swiglu, backend="aot_eager", fullgraph=True)
        got = with_gradients(compiled(*inputs, chunk_size), floating(inputs), upstream)
        want = with_gradients(expert_swiglu(*inputs, chunk_size), floating(inputs), upstream)
        assert worst(relative_error(a, b) for a, b in zip(got, want, strict=True)) < 1e-13
    torch._dynamo.reset()


def test_without_values_it_has_shapes() -> None:
    inputs, upstream = make()
    with FakeTensorMode() as mode:
        fakes = tuple(mode.from_tensor(x) for x in inputs)
        y = expert_swiglu(*fakes)  # type: ignore[arg-type]
        grads = torch.autograd.grad(y, floating(fakes), torch.empty_like(y))  # type: ignore[arg-type]
    assert y.shape == upstream.shape
    assert [x.shape for x in grads] == [x.shape for x in floating(inputs)]
