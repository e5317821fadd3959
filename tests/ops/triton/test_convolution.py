"""The convolution's kernels, in Triton's interpreter, equal the definition: outputs and every gradient, on every rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from longspan.attention.convolution import causal_conv1d
from longspan.errors import InputError
from longspan.layout import Order, SequenceLayout
from longspan.ops.convolution import MAX_TAPS_OF_KERNELS
from longspan.ops.triton import convolution as kernels
from longspan.ops.triton import launch
from longspan.ops.triton.convolution import HEADS, INSIDE, rows_of
from tests import unwritten
from tests.attention.convolution_reference import Documents, definition, documents_of
from tests.compare import relative_error, worst, worst_of
from tests.ops.test_variants import unwritten_memory_is_nan
from tests.ranks import run_on_ranks

__all__ = ["unwritten_memory_is_nan"]

TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def make(
    seq_len: int,
    taps: int,
    documents: Documents = None,
    *,
    batch: int = 1,
    channels: int = 5,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Global x, parameters, initial state, and a random gradient of y."""
    generator = torch.Generator().manual_seed(seq_len * 10 + taps)
    shapes = {
        "x": (batch, seq_len, channels),
        "weight": (channels, taps),
        "bias": (channels,),
        "initial_state": (batch if documents is None else len(documents) - 1, taps - 1, channels),
        "grad_y": (batch, seq_len, channels),
    }
    return {
        name: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for name, shape in shapes.items()
    }


def errors_on_rank(
    given: dict[str, Tensor],
    documents: Documents,
    order: Order = "contiguous",
    activation: str | None = "silu",
    without: tuple[str, ...] = (),
) -> dict[str, float]:
    """Errors of this rank's y and gradients; those of replicated inputs are summed over the ranks.

    without: what of bias and initial_state is left out.
    """
    # One tap reaches no state.
    without = (*without, *(["initial_state"] if given["weight"].shape[1] == 1 else []))
    names = [name for name in ("x", "weight", "bias", "initial_state") if name not in without]
    whole = {name: given[name].double().requires_grad_() for name in names}
    expected, _ = definition(
        whole["x"], whole["weight"], whole.get("bias"), activation, documents, whole.get("initial_state")
    )
    grads_expected = torch.autograd.grad(expected, list(whole.values()), given["grad_y"].double())

    seq_len = given["x"].shape[1]
    layout = SequenceLayout(seq_len, order=order, documents=documents)
    own = {name: (layout.shard(given[name]) if name == "x" else given[name]).clone().requires_grad_() for name in names}
    y = causal_conv1d(
        own["x"],
        own["weight"],
        own.get("bias"),
        activation,
        layout,
        initial_state=own.get("initial_state"),
        backend="triton",
    )
    assert isinstance(y, Tensor)
    grads = torch.autograd.grad(y, list(own.values()), layout.shard(given["grad_y"]))
    assert all(got.dtype == given["x"].dtype for got in (y, *grads))
    errors = {"y": relative_error(y, layout.shard(expected))}
    for name, grad, want in zip(names, grads, grads_expected, strict=True):
        if name == "x":
            want = layout.shard(want)
        elif layout.num_ranks > 1:
            grad = grad.double()
            dist.all_reduce(grad)
        errors[f"d{name}"] = relative_error(grad, want)
    return errors


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = "silu", **options: Any
) -> Tensor:
    """y by the kernels."""
    y = causal_conv1d(x, weight, bias, activation, **{"backend": "triton", **options})
    assert isinstance(y, Tensor)
    return y


@pytest.mark.slow_rows(r"^silu-[23]")
@pytest.mark.slow_rows(r"^(None-[135]|silu-5)")
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^(None-4|silu-1)$")
@pytest.mark.parametrize("taps", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_kernels_equal_the_definition_with_every_gradient(taps: int, activation: str | None) -> None:
    for seq_len, documents, batch in [(1, None, 2), (37, None, 2), (70, [0, 1, 2, 5, 33, 34, 70], 1)]:
        for without in ((), ("bias", "initial_state")):
            errors = errors_on_rank(
                make(seq_len, taps, documents, batch=batch), documents, activation=activation, without=without
            )
            assert worst(errors) < 5e-6, (seq_len, documents, without, errors)


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"float32$")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_dtype_and_more_channels_than_a_block(dtype: torch.dtype) -> None:
    documents = [0, 3, 40]
    errors = errors_on_rank(make(40, 4, documents, channels=70, dtype=dtype), documents)
    assert worst(errors) < TOLERANCE[dtype], errors


def test_sums_in_float32_are_rounded_once() -> None:
    """In bfloat16 the result is that of float32 inputs of the same values, rounded."""
    given = make(40, 4, dtype=torch.bfloat16)
    y = convolve(given["x"], given["weight"], given["bias"])
    exact = {name: x.double() for name, x in given.items()}
    expected, _ = definition(exact["x"], exact["weight"], exact["bias"], "silu", None, None)
    torch.testing.assert_close(y, expected.bfloat16(), rtol=2**-7, atol=1e-6)


def test_the_most_taps() -> None:
    assert worst(errors_on_rank(make(20, MAX_TAPS_OF_KERNELS), None)) < 5e-6


def test_some_inputs_may_need_no_gradient() -> None:
    given = make(40, 4)
    leaves = {name: given[name].requires_grad_() for name in ("x", "weight", "bias")}
    y = convolve(*leaves.values())
    every = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), given["grad_y"]), strict=True))
    for wanted in (["x"], ["weight"], ["bias"], ["x", "bias"]):
        some = {name: x.detach().requires_grad_(name in wanted) for name, x in leaves.items()}
        y = convolve(*some.values())
        for name, grad in zip(
            wanted, torch.autograd.grad(y, [some[name] for name in wanted], given["grad_y"]), strict=True
        ):
            assert torch.equal(grad, every[name])


def test_tensors_need_not_be_contiguous() -> None:
    given = make(40, 4, batch=2)
    plain = convolve(given["x"], given["weight"], given["bias"])
    # Columns of a wider tensor, as of one projection for several things; and channels that do not lie side by side.
    wide = torch.cat([given["x"], given["x"]], dim=-1)[..., : given["x"].shape[-1]]
    for x in (wide, given["x"].mT.contiguous().mT):
        leaf = x.detach().requires_grad_()
        y = convolve(leaf, given["weight"].t().contiguous().t(), given["bias"])
        assert torch.equal(y, plain)
        (first,) = torch.autograd.grad(y, leaf, given["grad_y"], retain_graph=True)
        (second,) = torch.autograd.grad(y, leaf, given["grad_y"].mT.contiguous().mT)
        assert torch.equal(first, second)


# The interpreter computes with numpy, which warns of ∞ · 0 in numbers that are then left out.
infinities = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")


@infinities
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_document_with_an_infinity_harms_no_other(value: float) -> None:
    documents = [0, 4, 5, 6, 40]
    given = make(40, 4, documents)
    given["x"][:, 5] = value
    given["initial_state"][1] = value
    x = given["x"].requires_grad_()
    layout = SequenceLayout.local(40, documents)
    y = convolve(x, given["weight"], given["bias"], layout=layout, initial_state=given["initial_state"])
    (grad,) = torch.autograd.grad(y, x, given["grad_y"])
    others = [token for token in range(40) if token not in (4, 5)]
    assert y[:, others].isfinite().all() and grad[:, others].isfinite().all()


@infinities
def test_an_infinity_reaches_only_the_tokens_whose_taps_see_it() -> None:
    given = make(8, 4)
    given["initial_state"][:, 0] = float("inf")
    y = convolve(given["x"], given["weight"], given["bias"], activation=None, initial_state=given["initial_state"])
    assert not y[:, 0].isfinite().any() and y[:, 1:].isfinite().all()


# Gradients are right in make test, above.
@pytest.mark.slow
def test_gradients_are_the_same_every_time() -> None:
    given = make(100, 4, batch=3)
    leaves = [given[name].requires_grad_() for name in ("x", "weight", "bias", "initial_state")]
    results = []
    for _ in range(2):
        y = convolve(*leaves[:3], initial_state=leaves[3])
        results.append(torch.autograd.grad(y, leaves, given["grad_y"]))
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


def test_a_compiler_keeps_one_graph() -> None:
    given = make(40, 4, [0, 3, 40])
    layout = SequenceLayout.local(40, [0, 3, 40])
    leaves = [given[name].requires_grad_() for name in ("x", "weight", "bias")]
    expected = convolve(*leaves, layout=layout)
    compiled = torch.compile(lambda *args: convolve(*args, layout=layout), backend="aot_eager", fullgraph=True)
    y = compiled(*leaves)
    assert torch.equal(y, expected)
    for got, want in zip(
        torch.autograd.grad(y, leaves, given["grad_y"]),
        torch.autograd.grad(expected, leaves, given["grad_y"]),
        strict=True,
    ):
        assert torch.equal(got, want)


def test_the_operators_are_what_they_say_to_a_compiler() -> None:
    given = make(9, 3, [0, 4, 9])
    weight = given["weight"].requires_grad_()
    layout = SequenceLayout.local(9, [0, 4, 9])
    rows = rows_of(layout, 2, torch.tensor([4, 5]), torch.tensor([0, 0]))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    inside = (given["x"].requires_grad_(), weight, given["bias"].requires_grad_(), rows.table, 2, True)
    torch.library.opcheck(INSIDE.operator, inside, test_utils=checks)
    z_heads, before = torch.randn(1, 2, 5, requires_grad=True), torch.randn(1, 1, 2, 5, requires_grad=True)
    torch.library.opcheck(HEADS.operator, (z_heads, before, weight, rows.heads, True), test_utils=checks)


@unwritten.unwritten_memory_is_nan()
def worst_over_ranks(order: Order, packed: bool) -> tuple[float, str]:
    """This rank's largest error over lengths and numbers of taps, and what it is of."""
    errors: dict[str, float] = {}
    for seq_len, taps, without in [(4, 5, ()), (9, 2, ("initial_state",)), (37, 4, ("bias",)), (37, 1, ())]:
        documents = documents_of(seq_len)[1 if packed else 0]
        batch = 1 if packed else 2
        found = errors_on_rank(make(seq_len, taps, documents, batch=batch), documents, order, without=without)
        errors |= {f"{name} of {seq_len} tokens, {taps} taps": error for name, error in found.items()}
    return worst_of(errors)


@pytest.mark.slow_rows(r"2-False-contiguous|2-True-zigzag")
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^2-False-zigzag$")
@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("num_ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_every_rank_equals_the_definition_with_every_gradient(num_ranks: int, packed: bool, order: Order) -> None:
    for error, what in run_on_ranks(num_ranks, worst_over_ranks, order, packed):
        assert error < 5e-6, what


def test_a_backend_that_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    given = make(8, 9)
    with pytest.raises(InputError, match="up to 8 taps; got a weight of 9"):
        causal_conv1d(given["x"], given["weight"], backend="triton")
    doubles = {name: x.double() for name, x in given.items()}
    with pytest.raises(InputError, match=r"float32, bfloat16 or float16 with backend='triton'; got x of torch.float64"):
        causal_conv1d(doubles["x"], doubles["weight"], backend="triton")
    with pytest.raises(InputError, match="backend must be None or one of 'torch', 'triton'; got 'fla'"):
        causal_conv1d(given["x"], given["weight"], backend="fla")
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    given = make(8, 3)
    with pytest.raises(InputError, match="backend='triton' runs on NVIDIA GPUs; the tensors are on cpu"):
        causal_conv1d(given["x"], given["weight"], backend="triton")


def test_without_a_gpu_none_is_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "TritonConvolution", None)
    given = make(8, 3)
    x, weight = given["x"], given["weight"]
    assert torch.equal(convolve(x, weight, backend=None), convolve(x, weight, backend="torch"))
