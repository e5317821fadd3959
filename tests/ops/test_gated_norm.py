"""RMSNorm with a gate, by PyTorch and by kernels in Triton's interpreter, equals its definition in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import longspan
from longspan.errors import InputError
from longspan.models.norms import GatedRMSNorm
from longspan.ops import norm as gated_norm
from longspan.ops.norm import Activation, rms_norm_gated
from longspan.ops.triton import norm as kernels
from tests.compare import relative_error, worst
from tests.ops.test_variants import unwritten_memory_is_nan

__all__ = ["unwritten_memory_is_nan"]

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def make(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """x, gate, weight and a gradient of y."""
    generator = torch.Generator().manual_seed(sum(shape))
    shapes = [shape, shape, shape[-1:], shape]
    return [torch.randn(*x, generator=generator, dtype=torch.float64).to(dtype) for x in shapes]


def definition(x: Tensor, gate: Tensor, weight: Tensor, eps: float, activation: Activation) -> Tensor:
    factor = gate.sigmoid() * (gate if activation == "silu" else 1.0)
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight * factor


def errors(given: list[Tensor], eps: float, activation: Activation, backend: str) -> list[float]:
    """Of y, ∂x, ∂gate and ∂weight."""
    # A row of one number is normed to its sign: its ∂x is what eps leaves of the difference of two equal numbers.
    floors = [0.0, 1.0 if given[0].shape[-1] == 1 else 0.0, 0.0, 0.0]
    *tensors, grad = given
    exact = [x.double().requires_grad_() for x in tensors]
    own = [x.clone().requires_grad_() for x in tensors]
    expected = definition(exact[0], exact[1], exact[2], eps, activation)
    got = rms_norm_gated(own[0], own[1], own[2], eps, activation, backend=backend)
    assert got.dtype == own[0].dtype
    pairs = [(got, expected)]
    pairs += zip(torch.autograd.grad(got, own, grad), torch.autograd.grad(expected, exact, grad.double()), strict=True)
    return [relative_error(x, y, floor) for (x, y), floor in zip(pairs, floors, strict=True)]


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("torch", dtype) for dtype in TOLERANCE] + [("triton", dtype) for dtype in TOLERANCE if dtype != torch.float64],
    ids=str,
)
@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
def test_outputs_and_gradients_equal_the_definition(backend: str, dtype: torch.dtype, activation: Activation) -> None:
    assert worst(errors(make((2, 5, 3, 20), dtype), 1e-5, activation, backend)) < TOLERANCE[dtype]


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 1), (67, 64), (2, 3, 5000)], ids=str)
def test_kernels_take_any_number_of_rows_and_any_size(shape: tuple[int, ...]) -> None:
    assert worst(errors(make(shape, torch.float32), 1e-3, "silu", "triton")) < 5e-6


def test_rows_that_are_not_there_count_for_nothing_without_eps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tiles to a program, the last ones partly or wholly behind the rows."""
    monkeypatch.setattr(kernels, "TILE", 64)
    monkeypatch.setattr(kernels, "MAX_PROGRAMS", 3)
    assert worst(errors(make((37, 12), torch.float32), 0.0, "silu", "triton")) < 5e-6


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_gate_and_a_weight_may_be_of_other_dtypes(backend: str) -> None:
    x, gate, weight, _ = make((4, 3, 10), torch.float32)
    leaves = [x.bfloat16().requires_grad_(), gate.requires_grad_(), weight.requires_grad_()]
    y = rms_norm_gated(leaves[0], leaves[1], leaves[2], backend=backend)
    expected = definition(leaves[0].double(), gate.double(), weight.double(), 1e-5, "silu")
    assert y.dtype == torch.bfloat16
    assert relative_error(y, expected) < 1e-2
    for leaf, grad in zip(leaves, torch.autograd.grad(y.sum(), leaves), strict=True):
        assert grad.dtype == leaf.dtype


def test_strided_inputs_and_no_rows_at_all() -> None:
    x, gate, weight, _ = make((6, 4, 5), torch.float32)
    got = rms_norm_gated(x.transpose(0, 1), gate.transpose(0, 1), weight, backend="triton")
    assert torch.equal(got, rms_norm_gated(x, gate, weight, backend="triton").transpose(0, 1))
    empty = x[:0].requires_grad_()
    y = rms_norm_gated(empty, gate[:0], weight.requires_grad_(), backend="triton")
    assert y.shape == (0, 4, 5)
    grad_x, grad_weight = torch.autograd.grad(y.sum(), [empty, weight])
    assert grad_x.shape == empty.shape
    assert torch.equal(grad_weight, torch.zeros(5))


def test_the_operators_pass_pytorchs_own_checks() -> None:
    x, gate, weight, _ = make((3, 2, 6), torch.float32)
    leaves = [tensor.requires_grad_() for tensor in (x, gate, weight)]
    torch.library.opcheck(kernels.FORWARD.operator, (*leaves, 1e-5, True))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_torch_compile_keeps_one_graph(backend: str) -> None:
    x, gate, weight, _ = make((2, 7, 6), torch.float32)
    compiled = torch.compile(longspan.rms_norm_gated, fullgraph=True, backend="aot_eager")
    got = compiled(x, gate, weight, backend=backend)
    assert torch.equal(got, rms_norm_gated(x, gate, weight, backend=backend))


def test_the_models_layer_is_the_function() -> None:
    x, gate, _, _ = make((2, 4, 3, 8), torch.float32)
    norm = GatedRMSNorm(8, 1e-3)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2.0)
    assert torch.equal(norm(x, gate), rms_norm_gated(x, gate, norm.weight, 1e-3))


def test_what_cannot_be_computed_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    x, gate, weight, _ = make((2, 3, 4), torch.float32)
    with pytest.raises(InputError, match=r"unflatten\(-1, \(H, D\)\)"):
        rms_norm_gated(x, gate.flatten(1), weight)
    with pytest.raises(InputError, match=r"weight \[D\] = \(4,\)"):
        rms_norm_gated(x, gate, weight[:3])
    with pytest.raises(InputError, match=r"x must be a floating-point tensor; got a Tensor of torch\.int64"):
        rms_norm_gated(x.long(), gate, weight)
    with pytest.raises(InputError, match="activation must be one of 'silu', 'sigmoid'; got 'relu'"):
        rms_norm_gated(x, gate, weight, activation="relu")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="backend must be None or one of 'torch', 'triton'"):
        rms_norm_gated(x, gate, weight, backend="fla")
    with pytest.raises(InputError, match="no float64"):
        rms_norm_gated(x, gate, weight.double(), backend="triton")
    monkeypatch.setattr(gated_norm, "MAX_SIZE_OF_KERNELS", 3)
    with pytest.raises(InputError, match="D up to 3; got 4"):
        rms_norm_gated(x, gate, weight, backend="triton")
