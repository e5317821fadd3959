"""The kernels of the decay family, in Triton's interpreter, equal the recurrent form: outputs, states and every gradient."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import longspan
from longspan.ops.triton import stretches
from longspan.ops.variants import VARIANTS
from tests.compare import relative_error
from tests.ops.test_variants import run, unwritten_memory_is_nan
from tests.variants import Inputs, make_inputs, reference

__all__ = ["unwritten_memory_is_nan"]

NAMES = [name for name, variant in VARIANTS.items() if "triton" in variant.backends]
# Its kernels are gla's, of which all rows run in `make test`.
ROWS = [pytest.param(name, marks=pytest.mark.slow) if name == "gla_with_bonus" else name for name in NAMES]
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.fixture(autouse=True)
def short_stretches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sequences of a few tokens have several stretches."""
    monkeypatch.setattr(stretches, "MIN_LENGTH", 32)
    yield


def assert_right(name: str, inputs: Inputs, tolerance: float = 5e-6, **options: Any) -> None:
    got, expected = run(name, inputs, **{"chunk_size": 16, "backend": "triton", **options})
    for key in expected:
        error = relative_error(got[key], expected[key])
        # ∂g is a small difference of large sums.
        assert error < tolerance * (4 if key == "g" else 1), (key, error)


def test_the_decay_family_has_kernels() -> None:
    assert NAMES == ["linear_attention", "retention", "simple_gla", "gla", "gla_with_bonus"]


# Those of a constant decay and of none have several stretches in `test_no_decay_is_too_strong_or_too_weak`, too.
@pytest.mark.slow_rows(r"^(31|16)-", r"^70-(linear_attention|retention)")
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^70-simple_gla$", r"^1-(simple_gla|retention)$")
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("seq_len", [1, 16, 31, 70])
def test_kernels_equal_the_recurrent_form_at_any_length(name: str, seq_len: int) -> None:
    assert_right(name, make_inputs(name, seq_len, dtype=torch.float32, heads=1, batch=2))


@pytest.mark.slow_rows(
    r"float32-(retention|linear_attention|simple_gla)",
    r"bfloat16",
    r"float16-retention",
    r"(bfloat16-gla|float16-linear_attention|float16-gla)",
)
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"float32-gla$")
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_packed_documents_groups_and_sizes_that_are_no_power_of_two(name: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(
        name, 60, documents=[0, 1, 6, 60], heads=2, key_heads=1, key_size=5, value_size=18, dtype=dtype
    )
    assert_right(name, inputs, TOLERANCE[dtype], form="fused" if dtype == torch.bfloat16 else "overlapped")


@pytest.mark.slow_rows(r"sizes0-(retention|linear_attention)")
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"sizes0-simple_gla$")
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize(
    "sizes",
    [
        (80, 72),
        pytest.param((256, 144), marks=pytest.mark.slow),
        pytest.param((40, 256), marks=pytest.mark.slow),
        pytest.param((256, 256), marks=pytest.mark.slow),
    ],
)
def test_heads_wider_than_a_tile(name: str, sizes: tuple[int, int]) -> None:
    key_size, value_size = sizes
    inputs = make_inputs(name, 20, heads=1, key_size=key_size, value_size=value_size, dtype=torch.float32)
    assert_right(name, inputs, chunk_size=None)


@pytest.mark.slow_rows(r"^(5\.0|60\.0)-", r"^0\.0-(retention|simple_gla)", r"^1000\.0-linear_attention")
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^1000\.0-simple_gla$", r"^0\.0-gla$")
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("decay", [0.0, 5.0, 60.0, 1000.0])
def test_no_decay_is_too_strong_or_too_weak(name: str, decay: float) -> None:
    inputs = make_inputs(name, 40, decay=decay, heads=1, documents=[0, 3, 40], dtype=torch.float32)
    # Sums of decays that leave nothing have fewer digits behind the point.
    tolerance = 5e-6 if decay < 10 else 1e-4
    if decay < 1000.0:
        assert_right(name, inputs, tolerance, chunk_size=32)
        return
    got, expected = run(name, inputs, chunk_size=32, backend="triton")
    for key in expected:
        # The kernels find ∂g as a difference of products, and keep the digits of these; where a decay leaves nothing, ∂g has none.
        floor = float((inputs.k.detach() * expected["k"]).abs().max()) if key == "g" else 0.0
        assert relative_error(got[key], expected[key], floor) < (5e-6 if key == "g" else tolerance), key


@pytest.mark.slow_rows(r"^simple_gla$")
@pytest.mark.parametrize("name", ["simple_gla", "gla"])
def test_a_decay_to_nothing_cuts_the_sequence_without_nan(name: str) -> None:
    inputs = make_inputs(name, 40, dtype=torch.float32)
    values = inputs.gates["g"].detach().clone()
    values.view(-1)[::7] = -torch.inf
    inputs.gates["g"] = values.requires_grad_()
    got, expected = run(name, inputs, chunk_size=16, backend="triton")
    for key in ("o", "final", "q", "k", "v"):
        assert relative_error(got[key], expected[key]) < 1e-4, key
    assert bool(got["g"].isfinite().all())


# By PyTorch's kernels it runs in make test, in `tests/ops/test_variants.py`.
@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_memory_may_be_read_twice(name: str) -> None:
    inputs = make_inputs(name, 45, heads=2, key_heads=1, dtype=torch.float32)
    options: dict[str, Any] = {**inputs.gates, "chunk_size": 16}
    memory = longspan.write(name, inputs.k, inputs.v, backend="triton", **options)
    other = torch.randn_like(inputs.q).requires_grad_()
    both = memory.read(inputs.q) + memory.read(other, scale=0.3)
    separate = [longspan.write(name, inputs.k, inputs.v, backend="torch", **options) for _ in range(2)]
    expected = separate[0].read(inputs.q) + separate[1].read(other, scale=0.3)
    assert relative_error(both, expected) < 5e-6
    leaves = [inputs.q, other, inputs.k, inputs.v, *(inputs.gates[key] for key in inputs.differentiable)]
    got = torch.autograd.grad((both * inputs.grad_o).sum(), leaves)
    for ours, theirs in zip(got, torch.autograd.grad((expected * inputs.grad_o).sum(), leaves), strict=True):
        assert relative_error(ours, theirs) < 2e-5


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^(gla_with_bonus|retention|linear_attention)$")
@pytest.mark.parametrize("name", NAMES)
def test_a_state_that_nobody_reads_still_has_its_gradient(name: str) -> None:
    inputs = make_inputs(name, 45, dtype=torch.float32)
    # A bonus weighs what is read, and is in no state.
    gates = [inputs.gates[key] for key in inputs.differentiable if key != "u"]
    leaves = [inputs.k, inputs.v, inputs.initial_state, *gates]
    grads = []
    for backend in ("triton", "torch"):
        memory = longspan.write(
            name, inputs.k, inputs.v, **inputs.gates, initial_state=inputs.initial_state, output_final_state=True,
            chunk_size=16, backend=backend,
        )  # fmt: skip
        grads.append(torch.autograd.grad((memory.final_state() * inputs.grad_final).sum(), leaves))
    for ours, theirs in zip(*grads, strict=True):
        assert relative_error(ours, theirs) < 1e-5


# That a loss may leave out the state runs in make test, above.
@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_gradients_may_be_asked_for_one_by_one(name: str) -> None:
    inputs = make_inputs(name, 45, heads=1, dtype=torch.float32)
    leaves = [inputs.q, inputs.k, inputs.v, *(inputs.gates[key] for key in inputs.differentiable)]
    memory = longspan.write(name, inputs.k, inputs.v, **inputs.gates, chunk_size=16, backend="triton")
    loss = (memory.read(inputs.q) * inputs.grad_o).sum()
    together = torch.autograd.grad(loss, leaves, retain_graph=True)
    for leaf, expected in zip(leaves, together, strict=True):
        assert torch.equal(torch.autograd.grad(loss, leaf, retain_graph=True)[0], expected)


def test_without_a_gradient_of_the_gate_none_is_made() -> None:
    inputs = make_inputs("simple_gla", 33, dtype=torch.float32)
    o = longspan.simple_gla(inputs.q, inputs.k, inputs.v, inputs.gates["g"].detach(), backend="triton")
    assert isinstance(o, Tensor)
    expected, _ = reference("simple_gla", inputs)
    del expected
    grads = torch.autograd.grad(o, [inputs.q, inputs.k, inputs.v], inputs.grad_o)
    assert all(bool(grad.isfinite().all()) for grad in grads)


def test_both_directions_run_on_kernels() -> None:
    inputs = make_inputs("retention", 40, dtype=torch.float32)
    q, k, v, log_decay = inputs.q, inputs.k, inputs.v, inputs.gates["log_decay"]
    ours = longspan.retention(q, k, v, log_decay, causal=False, backend="triton")
    theirs = longspan.retention(q, k, v, log_decay, causal=False, backend="torch")
    assert relative_error(ours, theirs) < 5e-6


def test_tensors_in_any_memory_layout_are_taken() -> None:
    inputs = make_inputs("gla", 40, heads=2, key_size=16, value_size=16, dtype=torch.float32)
    expected = longspan.gla(inputs.q, inputs.k, inputs.v, inputs.gates["g"], backend="triton")

    def scattered(x: Tensor) -> Tensor:
        return x.detach().transpose(1, 3).contiguous().transpose(1, 3)

    got = longspan.gla(*(scattered(x) for x in (inputs.q, inputs.k, inputs.v, inputs.gates["g"])), backend="triton")
    assert torch.equal(got, expected)


def test_what_the_kernels_do_not_take_is_refused() -> None:
    q, v = torch.zeros(1, 4, 1, 300), torch.zeros(1, 4, 1, 8)
    with pytest.raises(longspan.InputError, match="head sizes up to 256; got K = 300 and V = 8"):
        longspan.linear_attention(q, q, v, backend="triton")
    with pytest.raises(longspan.InputError, match="one dtype out of float32, bfloat16, float16 with backend='triton'"):
        longspan.linear_attention(v.double(), v.double(), v.double(), backend="triton")
    with pytest.raises(longspan.InputError, match="chunk_size of 16, 32, 64, 128; got 48"):
        longspan.linear_attention(v, v, v, backend="triton", chunk_size=48)
    with pytest.raises(longspan.InputError, match="backend must be None or one of 'torch', 'fla'; got 'triton'"):
        longspan.delta_rule(v, v, v, torch.ones(1, 4, 1), backend="triton")


def test_on_a_cpu_without_the_interpreter_the_error_says_what_to_do() -> None:
    code = (
        "import torch, longspan\n"
        "x = torch.zeros(1, 4, 1, 8)\n"
        "assert longspan.linear_attention(x, x, x).shape == x.shape\n"
        "try:\n    longspan.linear_attention(x, x, x, backend='triton')\n"
        "except longspan.InputError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env={"PATH": ""}, capture_output=True, text=True, check=True)
    assert "the tensors are on cpu. Use backend='torch' there" in done.stdout


@pytest.mark.slow_rows(r"^gla-None", r"^gla-documents2")
@pytest.mark.parametrize(("name", "documents"), [("retention", None), ("gla", None), ("gla", [0, 7, 40])])
def test_torch_compile_keeps_one_graph(name: str, documents: list[int] | None) -> None:
    inputs = make_inputs(name, 40, dtype=torch.float32)
    layout = None if documents is None else longspan.SequenceLayout.local(40, documents)
    leaves = [inputs.q, inputs.k, inputs.v]

    def call(*tensors: Tensor) -> Tensor:
        o = getattr(longspan, name)(*tensors, backend="triton", layout=layout)
        assert isinstance(o, Tensor)
        return o * 2.0

    gates = [gate.detach() for gate in inputs.gates.values()]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    got, expected = compiled(*leaves, *gates), call(*leaves, *gates)
    assert torch.equal(got, expected)
    for ours, theirs in zip(
        torch.autograd.grad(got, leaves, inputs.grad_o),
        torch.autograd.grad(expected, leaves, inputs.grad_o),
        strict=True,
    ):
        assert torch.equal(ours, theirs)
