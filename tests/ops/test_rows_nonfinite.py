"""Operators whose tokens have several rows, or that read before they decay: NaN, infinities and decays to nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from longspan.ops.variants import VARIANTS
from tests.compare import relative_error, worst
from tests.ops.test_delta_nonfinite import LEAST, call, gradients, plant, with_values
from tests.unwritten import unwritten_memory_is_nan
from tests.variants import Inputs, make_inputs, reference

NAMES = ("gated_delta_product", "dplr_delta_rule", "comba")
LENGTHS = (1, 65, 150)

pytestmark = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(autouse=True)
def unwritten() -> Iterator[None]:
    with unwritten_memory_is_nan():
        yield


def plantable(name: str) -> list[str]:
    return ["q", "k", "v", *(gate.name for gate in VARIANTS[name].gates if not gate.is_log_decay)]


def made(name: str, seq_len: int, dtype: torch.dtype = torch.float64, decay: float = 0.3) -> Inputs:
    return make_inputs(name, seq_len, batch=2, heads=2, key_heads=1, key_size=8, value_size=8, dtype=dtype, decay=decay)


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^dtype0-65-")
@pytest.mark.parametrize("seq_len", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_no_token_changes_an_earlier_output_by_what_is_not_finite(name: str, seq_len: int, dtype: torch.dtype) -> None:
    before, _ = call(name, made(name, seq_len, dtype))
    for number, key in enumerate((*plantable(name), "g")):
        token = (7 * number + 61) % seq_len
        for value in (-torch.inf, LEAST) if key == "g" else (torch.nan, torch.inf, torch.finfo(dtype).max):
            inputs = made(name, seq_len, dtype)
            plant(inputs, key, token, value)
            o, _ = call(name, inputs)
            if key == "g" or value == torch.finfo(dtype).max:
                # Other factors, or the system in float64: the same numbers, rounded otherwise.
                bound = 2e-6 if dtype == torch.float32 else 8e-3
                assert relative_error(o[:, :token], before[:, :token]) <= bound, (key, token, value)
            else:
                assert torch.equal(o[:, :token], before[:, :token]), (key, token, value)
                assert not o[-1, token:, -1].isfinite().all() or key in ("a", "p"), (key, token, value)


@pytest.mark.parametrize("seq_len", LENGTHS)
@pytest.mark.parametrize("decay", [0.3, 30.0])
def test_no_upstream_gradient_that_is_not_finite_reaches_a_later_token(name: str, seq_len: int, decay: float) -> None:
    plain = made(name, seq_len, decay=decay)
    expected = gradients(plain, *call(name, plain))
    for token in sorted({0, min(64, seq_len - 1), seq_len - 1}):
        inputs = made(name, seq_len, decay=decay)
        inputs.grad_o = inputs.grad_o.clone()
        inputs.grad_o[-1, token, -1, -1] = torch.nan
        got = gradients(inputs, *call(name, inputs))
        for key in ("q", "k", "v", *inputs.gates):
            later = got[key][:, token + 1 :]
            assert relative_error(later, expected[key][:, token + 1 :]) < 1e-12, (key, token)
        assert not got["k"][-1, : token + 1].isfinite().all(), token
        assert relative_error(got["q"][:, :token], expected["q"][:, :token]) < 1e-12, token


def test_what_is_not_finite_reaches_no_query_before_it_and_no_value_behind_it(name: str) -> None:
    # The last token of a chunk is in none of its systems.
    for key in plantable(name)[1:]:
        for token in (63, 70):
            plain, inputs = made(name, 150), made(name, 150)
            expected = gradients(plain, *call(name, plain))
            plant(inputs, key, token, torch.nan)
            got = gradients(inputs, *call(name, inputs))
            assert relative_error(got["q"][:, :token], expected["q"][:, :token]) < 1e-12, (key, token)
            assert relative_error(got["v"][:, token + 1 :], expected["v"][:, token + 1 :]) < 1e-12, (key, token)
            assert not got["q"][-1, token:].isfinite().all(), (key, token)
            for other in got:
                assert relative_error(got[other][:-1], expected[other][:-1]) < 1e-12, (key, other)


def test_a_document_keeps_its_nan_to_itself(name: str) -> None:
    documents = [0, 7, 8, 30, 100]
    plain = make_inputs(name, 100, documents=documents)
    o, final = call(name, plain)
    expected = gradients(plain, o, final)
    outside = torch.cat([torch.arange(8), torch.arange(30, 100)])
    for key in plantable(name):
        inputs = make_inputs(name, 100, documents=documents)
        plant(inputs, key, 8, torch.nan)
        got_o, got_final = call(name, inputs)
        got = gradients(inputs, got_o, got_final)
        assert torch.equal(got_o[:, outside], o[:, outside]), key
        assert torch.equal(got_final[[0, 1, 3]], final[[0, 1, 3]]), key
        for other in ("q", "k", "v", *inputs.gates):
            assert relative_error(got[other][:, outside], expected[other][:, outside]) < 1e-12, (key, other)


# Either by each value, and every value either way but for two.
@pytest.mark.slow_rows(r"^False--1000", r"^True--3[.]4")
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^True--inf-")
@pytest.mark.parametrize("value", [-torch.inf, LEAST, -1e3])
@pytest.mark.parametrize("packed", [False, True])
def test_a_gate_may_be_closed_at_any_token(name: str, packed: bool, value: float) -> None:
    documents = [0, 33, 50, 100] if packed else None
    for tokens in ([0], [-1], [63, 64], list(range(0, 100, 3)), list(range(100))):
        inputs = make_inputs(name, 100, heads=2, key_size=4, value_size=3, documents=documents)
        g = inputs.gates["g"].detach().clone()
        g[:, tokens] = value
        with_values(inputs, g=g)
        want_o, want_final = reference(name, inputs)
        expected = gradients(inputs, want_o, want_final) | {"o": want_o, "final": want_final}
        o, final = call(name, inputs)
        got = gradients(inputs, o, final) | {"o": o, "final": final}
        errors = {key: relative_error(got[key], x, floor=1e-12) for key, x in expected.items()}
        assert worst(errors) < 1e-9, (tokens, errors)
