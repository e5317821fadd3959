"""Second derivatives: every node of autograd either has them right or says that it has none, on one device and over ranks."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import longspan
from longspan import SequenceLayout
from longspan.attention.long_convolution.taps import convolve_taps
from longspan.errors import InputError
from longspan.first_order import first_order
from longspan.ops.chunked.swiglu import chunked_swiglu
from tests.ranks import raised, run_on_ranks

# Nodes that PyTorch's own check of second derivatives (gradgradcheck) passes; so far there is none.
TWICE_DIFFERENTIABLE: frozenset[str] = frozenset()


def functions_without(base: type, package: str) -> list[str]:
    """Names of all autograd functions of a package whose backward is not `first_order` and that are on no list."""
    missing = []
    left: list[Any] = base.__subclasses__()
    while left:
        function = left.pop()
        left += function.__subclasses__()
        name = f"{function.__module__}.{function.__qualname__}"
        if not function.__module__.startswith(package) or name in TWICE_DIFFERENTIABLE:
            continue
        if name != "longspan.first_order._Refuse" and not hasattr(function.backward, "is_first_order"):
            missing.append(name)
    return missing


def import_everything() -> None:
    for module in pkgutil.walk_packages(longspan.__path__, "longspan."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


def test_every_autograd_function_says_whether_it_can_be_differentiated_twice() -> None:
    import_everything()
    assert functions_without(torch.autograd.Function, "longspan") == []


def test_a_function_that_says_nothing_is_found() -> None:
    class Silent(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return grads[0] * 2

    assert any("Silent" in name for name in functions_without(torch.autograd.Function, __name__))


class Cube(torch.autograd.Function):
    """x³, whose second derivative would be missed: the product is of saved tensors, and made without a graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        out: Tensor = 3 * x**2 * grad
        return out


def test_first_order_refuses_every_way_to_a_second_derivative_and_no_other() -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    (first,) = torch.autograd.grad(Cube.apply(x).sum(), x, create_graph=True)
    assert torch.equal(first, torch.tensor([3.0, 12.0]))
    # Also where the upstream gradient is a constant, where one input is asked for, and where another term has a graph.
    for second in (lambda: first.sum().backward(), lambda: torch.autograd.grad((first + x).sum(), x)):
        with pytest.raises(InputError, match=r"Cube was differentiated twice.*differences of first derivatives"):
            second()
    (first,) = torch.autograd.grad(checkpoint(Cube.apply, x, use_reentrant=False).sum(), x, create_graph=True)
    with pytest.raises(InputError, match="Cube was differentiated twice"):
        first.sum().backward()
    (2.0 * x).sum().backward(create_graph=False)


def inputs_of(name: str, layout: SequenceLayout) -> tuple[list[Tensor], Callable[..., Tensor]]:
    """The leaves of a call of an operator, and the call."""
    num_tokens = layout.num_local_tokens
    generator = torch.Generator().manual_seed(3)

    def leaf(*shape: int, negative: bool = False) -> Tensor:
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (-x.abs() if negative else x).requires_grad_()

    q, k, v = (leaf(1, num_tokens, 2, 4) for _ in range(3))
    x, weight = leaf(1, num_tokens, 3), leaf(3, 4)
    g, channels, beta = (
        leaf(1, num_tokens, 2, negative=True),
        leaf(1, num_tokens, 2, 4, negative=True),
        torch.full((1, num_tokens, 2), 0.5, dtype=torch.float64, requires_grad=True),
    )
    decay = torch.full((2,), -0.1, dtype=torch.float64)
    labels = torch.zeros(1, num_tokens, dtype=torch.int64)
    ops: Any = longspan
    calls: dict[str, tuple[list[Tensor], Callable[..., Tensor]]] = {
        "linear_attention": ([q, k, v], lambda *t: ops.linear_attention(*t, layout=layout)),
        "two-sided": ([q, k, v], lambda *t: ops.linear_attention(*t, causal=False, layout=layout)),
        "retention": ([q, k, v], lambda *t: ops.retention(*t, decay, layout=layout)),
        "two-sided retention": ([q, k, v], lambda *t: ops.retention(*t, decay, causal=False, layout=layout)),
        "simple_gla": ([q, k, v, g], lambda *t: ops.simple_gla(*t, layout=layout)),
        "final state": ([k, v, g], lambda k, v, g: final_state(k, v, g, layout)),
        "gla": ([q, k, v, channels], lambda *t: ops.gla(*t, layout=layout)),
        "delta_rule": ([q, k, v, beta], lambda *t: ops.delta_rule(*t, layout=layout)),
        "gated_delta_rule": ([q, k, v, g, beta], lambda *t: ops.gated_delta_rule(*t, layout=layout)),
        "kda": ([q, k, v, channels, beta], lambda *t: ops.kda(*t, layout=layout)),
        "gated_delta_product": (
            [q, k, v, g, beta],
            lambda q, k, v, g, beta: ops.gated_delta_product(
                q, *(torch.stack([x, x], 2) for x in (k, v)), g, torch.stack([beta, beta], 2), layout=layout
            ),
        ),
        "dplr_delta_rule": ([q, k, v, q, k, channels], lambda *t: ops.dplr_delta_rule(*t, layout=layout)),
        "comba": ([q, k, v, q, g, beta], lambda *t: ops.comba(*t, layout=layout)),
        "gated_slot_attention": ([q, k, v, k, channels], lambda *t: ops.gated_slot_attention(*t, layout=layout)),
        "gla with a bonus": ([q, k, v, channels], lambda *t: ops.gla(*t, u=torch.ones(2, 4).double(), layout=layout)),
        **{
            f"softmax by {method}": (
                [q, k, v],
                lambda *t, method=method: ops.softmax_attention(*t, layout=layout, method=method),
            )
            for method in ("all_gather", "ring", "ulysses")
        },
        "causal_conv1d": ([x, weight], lambda *t: ops.causal_conv1d(*t, layout=layout)),
        "silu convolution": ([x, weight], lambda *t: ops.causal_conv1d(*t, None, "silu", layout)),
        "long convolution": ([x, weight], lambda *t: ops.long_conv1d(*t, layout=layout)),
        "long convolution by transforms": (
            [x, leaf(3, num_tokens)],
            lambda x, taps: by_transforms(x, taps, layout),
        ),
        "exponentials": (
            [x, leaf(3, 2, negative=True), leaf(3, 2)],
            lambda x, a, c: ops.long_conv1d(x, ops.ExponentialKernel(a, c), layout=layout),
        ),
        "token_shift": ([x], lambda t: ops.token_shift(t, layout=layout)),
        "hgrn2": ([q, k, v], lambda *t: ops.hgrn2(*t, layout=layout)),
        "chunked_cross_entropy": (
            [x, weight],
            lambda x, weight: ops.chunked_cross_entropy(x, weight.t(), labels, chunk_size=4),
        ),
        "chunked_swiglu": ([x, weight], lambda x, weight: chunked_swiglu(x, weight.t(), weight.t(), weight, 4)),
        "normalized": ([q, k, v], lambda *t: ops.normalized_linear_attention(*t, layout=layout)),
    }
    if layout.num_ranks > 1:
        calls["gather"] = ([x], lambda t: layout.gather(t))
        calls["convolution's final state"] = (
            [x, weight],
            lambda *t: ops.causal_conv1d(*t, layout=layout, output_final_state=True)[1],
        )
    return calls[name]


def by_transforms(x: Tensor, taps: Tensor, layout: SequenceLayout) -> Tensor:
    y = convolve_taps(x, taps, taps.shape[1], None, layout, "all_to_all", False)
    assert isinstance(y, Tensor)
    return y


def final_state(k: Tensor, v: Tensor, g: Tensor, layout: SequenceLayout) -> Tensor:
    q = torch.zeros_like(k)
    o, state = longspan.simple_gla(q, k, v, g, layout=layout, output_final_state=True)
    return state + 0.0 * o.sum()


OPERATORS = [
    *("linear_attention", "two-sided", "retention", "two-sided retention", "simple_gla", "final state", "gla"),
    *("gated_delta_product", "dplr_delta_rule", "comba", "gla with a bonus", "gated_slot_attention"),
    *("delta_rule", "gated_delta_rule", "kda", "softmax by all_gather", "softmax by ring", "softmax by ulysses"),
    *("long convolution", "long convolution by transforms", "exponentials"),
    *("causal_conv1d", "silu convolution", "token_shift", "hgrn2", "normalized"),
    *("chunked_cross_entropy", "chunked_swiglu"),
]


def layout_here(order: Any) -> SequenceLayout:
    return SequenceLayout(13, order=order) if dist.is_initialized() else SequenceLayout.local(13)


def differentiate_twice(name: str, order: str, sums: bool) -> None:
    """Raises what the second of two backward passes raises; the first must pass, and give what it gives without a graph."""
    layout = layout_here(order)
    leaves, call = inputs_of(name, layout)
    out = call(*leaves)
    out = out.sum() if sums else out.square().sum()
    wanted = torch.autograd.grad(out, leaves, retain_graph=True, allow_unused=True)
    # Backward takes some operators' buffers, so that it is a new call.
    out = call(*leaves)
    out = out.sum() if sums else out.square().sum()
    first: list[Tensor | None] = list(torch.autograd.grad(out, leaves, create_graph=True, allow_unused=True))
    for got, want in zip(first, wanted, strict=True):
        assert (got is None) == (want is None)
        assert got is None or torch.allclose(got, want)
    total = torch.stack([x.square().sum() for x in first if x is not None]).sum()
    torch.autograd.grad(total, leaves, allow_unused=True)


def refusals(names: list[str], order: str) -> list[tuple[str, str, str]]:
    return [(name, *raised(differentiate_twice, name, order, False)) for name in names]


@pytest.mark.parametrize("name", OPERATORS)
def test_a_second_derivative_on_one_device_is_refused(name: str) -> None:
    kind, message = raised(differentiate_twice, name, "contiguous", False)
    assert kind == "InputError", message
    assert "was differentiated twice" in message


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^2-zigzag$")
@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
@pytest.mark.parametrize("num_ranks", [2])
def test_a_second_derivative_over_ranks_is_refused_on_every_rank(num_ranks: int, order: str) -> None:
    names = [*OPERATORS, "gather", "convolution's final state"]
    for answers in run_on_ranks(num_ranks, refusals, names, order, timeout=180.0):
        for name, kind, message in answers:
            assert kind == "InputError", (name, message)
            assert "was differentiated twice" in message, (name, message)


@pytest.mark.parametrize("name", [name for name in OPERATORS if name not in ("causal_conv1d", "token_shift")])
def test_a_constant_upstream_gradient_hides_no_second_derivative(name: str) -> None:
    """Of what is not linear in its inputs."""
    kind, message = raised(differentiate_twice, name, "contiguous", True)
    assert kind == "InputError", message
    assert "was differentiated twice" in message
