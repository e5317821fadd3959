"""Gates at their ends over 100,000 tokens: nothing is lost, nothing overflows, and lower precision stays near float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import longspan
from longspan.ops.variants import VARIANTS
from tests.compare import relative_error
from tests.variants import Inputs, make_inputs, reference

NUM_TOKENS = 100_000
GATED = [name for name, variant in VARIANTS.items() if any(gate.is_log_decay for gate in variant.gates)]


def inputs_with_decay(name: str, log_decay: float, dtype: torch.dtype) -> Inputs:
    """Inputs whose log decays are all `log_decay`, rounded to `dtype` and kept in it."""
    inputs = make_inputs(name, NUM_TOKENS, heads=1, key_size=8, value_size=8, dtype=dtype)
    for gate in VARIANTS[name].gates:
        if gate.is_log_decay:
            values: Tensor = inputs.gates[gate.name]
            inputs.gates[gate.name] = torch.full_like(values, log_decay).requires_grad_(gate.differentiable)
    # What reads what is taken off reads as the keys write: products of so many other transitions grow without end.
    if "b" in inputs.gates:
        inputs.gates["b"] = (-0.5 * inputs.gates["a"].detach()).requires_grad_()
    if "p" in inputs.gates:
        inputs.gates["p"] = inputs.k.detach().to(inputs.gates["p"].dtype).requires_grad_()
    return inputs


def as_dtype(name: str, inputs: Inputs, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any]]:
    """q, k, v and gates as leaves of `dtype` (gates of the dtype of states)."""
    states = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = [x.detach().to(dtype).requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    gates = {
        gate.name: inputs.gates[gate.name].detach().to(states).requires_grad_(gate.differentiable)
        for gate in VARIANTS[name].gates
    }
    return tensors, gates


def run(name: str, inputs: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """o and gradients of the chunk form in `dtype`, as float64."""
    (q, k, v), gates = as_dtype(name, inputs, dtype)
    o = longspan.write(name, k, v, **gates).read(q)
    leaves = {"q": q, "k": k, "v": v, **{key: x for key, x in gates.items() if x.requires_grad}}
    grads = torch.autograd.grad((o.double() * inputs.grad_o.double()).sum(), list(leaves.values()))
    return {"o": o.detach().double(), **{key: g.double() for key, g in zip(leaves, grads, strict=True)}}


@pytest.mark.slow
@pytest.mark.parametrize("log_decay", [0.0, -30.0])
@pytest.mark.parametrize("name", GATED)
def test_gates_that_keep_everything_or_nothing_over_100_000_tokens(name: str, log_decay: float) -> None:
    inputs = inputs_with_decay(name, log_decay, torch.bfloat16)
    expected = run(name, inputs, torch.float64)
    inputs.scale = 8**-0.5
    with torch.no_grad():
        definition, _ = reference(name, inputs_without_state(inputs))
    assert relative_error(expected["o"], definition) < 1e-11
    floors = dict.fromkeys(expected, 0.0)
    if "g" in floors:
        # The gradient of a gate is a difference of the products q·∂q and k·∂k. At a gate of −30 nothing is left of it, and what the
        # difference rounds to is measured against the products.
        products = inputs.q.detach().double() * expected["q"]
        floors["g"] = float((products if expected["g"].dim() == 4 else products.sum(-1)).abs().max())
    # Relative to the largest value of each tensor. float32 sums 100,000 tokens into a state: 1e5 roundings of 6e-8.
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
        got = run(name, inputs, dtype)
        for key, values in expected.items():
            error = relative_error(got[key], values, floors[key])
            assert error < tolerance, (key, dtype, error)


def inputs_without_state(inputs: Inputs) -> Inputs:
    inputs.initial_state = torch.zeros_like(inputs.initial_state)
    return inputs
