"""Later tokens do not reach earlier ones: by no digit, and by no NaN; nor do gradients of earlier outputs reach later inputs."""

from __future__ import annotations

from itertools import pairwise, product
from typing import Any

import pytest
import torch
from torch import Tensor

import longspan
from longspan.dtypes import accumulation_dtype
from longspan.ops.variants import VARIANTS
from tests.compare import relative_error, worst
from tests.ops.accuracy import by_recurrence
from tests.variants import NUM_SLOTS

DECAYS = ["linear_attention", "retention", "simple_gla", "gla", "gla_with_bonus", "gated_slot_attention"]
# Kernels have tests of their own, with fewer cases: the interpreter is slow.
BACKENDS = ["torch"]
LENGTHS = [1, *(pytest.param(length, marks=pytest.mark.slow) for length in (63, 64, 65)), 100, 257]


def inputs_of(name: str, seq_len: int, dtype: torch.dtype, decay: float, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"B": 1, "T": seq_len, "H": 2, "K": 16, "M": NUM_SLOTS}
    state_size = VARIANTS[name].state_size(16, 16, NUM_SLOTS)
    inputs = {key: torch.randn(1, seq_len, 2, 16, generator=generator).to(dtype) for key in ("q", "k", "v")}
    inputs["initial_state"] = torch.randn(1, 2, *state_size, generator=generator).to(accumulation_dtype(dtype))
    for gate in VARIANTS[name].gates:
        shape = [sizes[dim] for dim in gate.dims]
        inputs[gate.name] = (-decay * torch.rand(shape, generator=generator)).to(accumulation_dtype(dtype))
    return inputs


def call(name: str, inputs: dict[str, Tensor], backend: str, documents: list[int] | None = None) -> Tensor:
    gates: dict[str, Any] = {gate.name: inputs[gate.name] for gate in VARIANTS[name].gates}
    layout = None if documents is None else longspan.SequenceLayout.local(inputs["v"].shape[1], documents)
    initial = inputs["initial_state"]
    if documents is not None:
        initial = initial.expand(len(documents) - 1, -1, -1, -1)
    memory = longspan.write(
        name, inputs["k"], inputs["v"], **gates, initial_state=initial, backend=backend, layout=layout
    )
    return memory.read(inputs["q"])


def changed(inputs: dict[str, Tensor], key: str, token: int, value: float) -> dict[str, Tensor]:
    """The inputs with one number of `key` at a token set to `value`."""
    x = inputs[key].detach().clone()
    x[0, token].view(-1)[3 % x[0, token].numel()] = value
    return {**inputs, key: x}


def in_time(name: str) -> list[str]:
    return ["q", "k", "v", *(gate.name for gate in VARIANTS[name].gates if "T" in gate.dims)]


# In bfloat16 the longest.
@pytest.mark.slow_rows(r"-(1|100)-dtype1$")
# Others of their kind run in make test.
@pytest.mark.slow_rows(
    r"^(?!simple_gla).*-100-dtype0$", r"^(gated_slot_attention|gla_with_bonus|retention)-257-dtype1$"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seq_len", LENGTHS)
@pytest.mark.parametrize("name", DECAYS)
def test_a_later_token_changes_no_digit_of_earlier_outputs(name: str, seq_len: int, dtype: torch.dtype) -> None:
    for backend, decay in product(BACKENDS, (0.1, 3.0)):
        inputs = inputs_of(name, seq_len, dtype, decay, seed=seq_len)
        expected = call(name, inputs, backend)
        for key, at in product(in_time(name), (0.2, 0.65, 0.99)):
            token = int(at * seq_len)
            values = (-0.01, -7.0, -1e3, -torch.inf) if key == "g" else (5.0, torch.nan, torch.inf, -torch.inf)
            for value in values:
                got = call(name, changed(inputs, key, token, value), backend)
                assert torch.equal(got[:, :token], expected[:, :token]), (backend, decay, key, token, value)


@pytest.mark.parametrize("documents", [[0, 40, 41, 70, 100], [0, 64, 100]], ids=str)
@pytest.mark.parametrize("name", DECAYS)
def test_nan_stays_in_its_document(name: str, documents: list[int]) -> None:
    for backend in BACKENDS:
        inputs = inputs_of(name, 100, torch.float32, 0.1, seed=0)
        expected = call(name, inputs, backend, documents)
        for key, token in product(("q", "k", "v"), (0, 40, 41, 66, 99)):
            got = call(name, changed(inputs, key, token, torch.nan), backend, documents)
            stop = next(bound for bound in documents if bound > token)
            assert torch.equal(got[:, :token], expected[:, :token])
            assert torch.equal(got[:, stop:], expected[:, stop:])
            assert not got[:, token].isfinite().all()


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^(retention|simple_gla|gla_with_bonus)-70$")
@pytest.mark.parametrize("seq_len", [1, 70])
@pytest.mark.parametrize("name", DECAYS)
def test_what_is_not_finite_reaches_what_it_reaches_in_the_recurrence(name: str, seq_len: int) -> None:
    """Of a NaN in an input or in an upstream gradient: outputs and gradients that the recurrence has finite are finite."""
    for backend, decay in product(BACKENDS, (0.1, 3.0)):
        inputs = inputs_of(name, seq_len, torch.float32, decay, seed=seq_len)
        up = torch.randn(inputs["v"].shape, generator=torch.Generator().manual_seed(1))
        for key, at in product(("q", "k", "v", "up"), (0.0, 0.3, 0.95)):
            token = int(at * seq_len)
            case = changed({**inputs, "up": up}, key, token, torch.nan)
            upstream = {"o": case.pop("up"), "final": torch.zeros_like(inputs["initial_state"])}
            want = by_recurrence(name, case, upstream, torch.float64)
            constant = [gate.name for gate in VARIANTS[name].gates if not gate.differentiable]
            case = {item: x.clone().requires_grad_(item not in constant) for item, x in case.items()}
            leaves = [item for item in case if item not in constant]
            o = call(name, case, backend)
            got = {"o": o}
            grads = torch.autograd.grad(o, [case[item] for item in leaves], upstream["o"])
            got |= {f"d{item}": grad for item, grad in zip(leaves, grads, strict=True)}
            for item, x in got.items():
                finite = want[item].isfinite()
                assert x[finite].isfinite().all(), (backend, decay, key, token, item, "is not finite")
                assert not x[~finite].isfinite().any(), (backend, decay, key, token, item, "is finite")


@pytest.mark.slow_rows(r"^(simple_gla|retention)-100-")
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^gla-100-", r"^simple_gla-257--(1000|3[.]4)", r"^retention-257--(inf|3[.]4)")
@pytest.mark.parametrize("value", [-torch.inf, torch.finfo(torch.float32).min, -1e3])
@pytest.mark.parametrize("seq_len", LENGTHS)
@pytest.mark.parametrize("name", ["retention", "simple_gla", "gla"])
def test_a_gate_may_be_closed_at_any_token(name: str, seq_len: int, value: float) -> None:
    documents = [None, [0, seq_len // 3, seq_len]] if seq_len > 2 else [None]
    for backend, at, documents_of in product(BACKENDS, (0.0, 0.65), documents):
        inputs = inputs_of(name, seq_len, torch.float32, 0.5, seed=1)
        gate = VARIANTS[name].gates[0]
        if "T" in gate.dims:
            inputs["g"][:, int(at * seq_len)] = value
        else:
            inputs["log_decay"][0] = value
        constant = [gate.name] * (not gate.differentiable)
        leaves = {key: x.clone().requires_grad_(key not in constant) for key, x in inputs.items()}
        o = call(name, leaves, backend, documents_of)
        up = torch.randn(o.shape, generator=torch.Generator().manual_seed(1))
        named = [key for key in leaves if key not in constant]
        grads = torch.autograd.grad(o, [leaves[key] for key in named], up)
        bounds = documents_of or [0, seq_len]
        outputs = []
        exact = {key: x.double().requires_grad_(key not in constant) for key, x in inputs.items()}
        for start, stop in pairwise(bounds):
            rows = {gate.name: exact[gate.name][:, start:stop] if "T" in gate.dims else exact[gate.name]}
            q, k, v = (exact[key][:, start:stop] for key in ("q", "k", "v"))
            outputs.append(VARIANTS[name].recurrent(q, k, v, rows, 0.25, exact["initial_state"])[0])
        want = torch.cat(outputs, dim=1)
        want_grads = torch.autograd.grad(want, [exact[key] for key in named], up.double())
        pairs = zip((o, *grads), (want, *want_grads), strict=True)
        assert worst(relative_error(x, y) for x, y in pairs) < 3e-6, (backend, at)
