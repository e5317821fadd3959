"""Kernels lose no more digits than their recurrences, and no later token reaches an earlier one; in Triton's interpreter."""

from __future__ import annotations

from itertools import product

import pytest
import torch

pytest.importorskip("triton")

from tests.ops.accuracy import by_recurrence, errors
from tests.ops.test_causality import call, changed, in_time, inputs_of

# NumPy, which the interpreter computes with, warns of the NaN and infinities that these tests plant.
NOT_FINITE = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
GATES = ["0 to -1", "-5.9 to -6", "0 to -20", "0 to -1, 17 times -inf"]


@pytest.mark.slow_rows(r"^(gla|linear_attention)")
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["simple_gla", "gla"])
def test_errors_are_at_most_three_times_those_of_the_recurrence(name: str, dtype: torch.dtype) -> None:
    for gates in GATES:
        for key, (error, of_recurrence) in errors(name, gates, dtype, "triton").items():
            bound = 3 * of_recurrence if of_recurrence > 2 * torch.finfo(dtype).eps else 6 * torch.finfo(dtype).eps
            if key == "dg" and dtype == torch.float32 and gates == "-5.9 to -6":
                # The sum over a whole run of tokens is a small difference; the docstrings say so.
                bound = 1e-4
            assert error <= bound, (gates, key, error, of_recurrence)


@pytest.mark.slow_rows(r"retention", r"^(gla|linear_attention)")
@NOT_FINITE
# The later one is behind a whole chunk and tokens of its own.
@pytest.mark.parametrize("token", [pytest.param(20, marks=pytest.mark.slow), 95])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["linear_attention", "retention", "simple_gla", "gla"])
def test_a_later_token_changes_no_digit_of_earlier_outputs(name: str, dtype: torch.dtype, token: int) -> None:
    inputs = inputs_of(name, 100, dtype, 1.0, seed=0)
    expected = call(name, inputs, "triton")
    for key in in_time(name):
        for value in (-1.0, -torch.inf) if key == "g" else (torch.nan, torch.inf):
            got = call(name, changed(inputs, key, token, value), "triton")
            assert torch.equal(got[:, :token], expected[:, :token]), (key, token, value)


# By PyTorch's kernels it runs in make test, in `tests/ops/test_causality.py`.
@pytest.mark.slow
@NOT_FINITE
@pytest.mark.parametrize("name", ["linear_attention", "retention", "simple_gla", "gla"])
def test_gradients_that_the_recurrence_has_finite_are_finite(name: str) -> None:
    inputs = inputs_of(name, 40, torch.float32, 1.0, seed=0)
    inputs["up"] = torch.randn(inputs["v"].shape, generator=torch.Generator().manual_seed(1))
    for key, token in product(("q", "k", "v", "up"), (5, 38)):
        case = changed(inputs, key, token, torch.nan)
        upstream = {"o": case.pop("up"), "final": torch.zeros_like(inputs["initial_state"])}
        want = by_recurrence(name, case, upstream, torch.float64)
        leaves = {item: case[item].clone().requires_grad_() for item in ("q", "k", "v")}
        o = call(name, {**case, **leaves}, "triton")
        grads = torch.autograd.grad(o, list(leaves.values()), upstream["o"])
        for item, grad in zip(leaves, grads, strict=True):
            assert torch.equal(grad.isfinite(), want[f"d{item}"].isfinite()), (key, token, item)
