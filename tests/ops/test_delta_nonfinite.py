"""The delta family with NaN, infinities and decays to nothing: nothing of a later token reaches an earlier one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import longspan
from longspan.ops.variants import VARIANTS
from tests.compare import relative_error, worst
from tests.ranks import run_on_ranks
from tests.variants import Inputs, make_inputs, reference

NAMES = ("delta_rule", "gated_delta_rule", "kda")
LENGTHS = (1, 63, 64, 65, 100, 257)
LEAST = torch.finfo(torch.float32).min

pytestmark = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan() -> Iterator[None]:
    """Fill `torch.empty` with NaN, so that memory which is read before it is written shows."""
    torch.use_deterministic_algorithms(True)
    deterministic: Any = torch.utils.deterministic
    deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def call(name: str, inputs: Inputs, layout: longspan.SequenceLayout | None = None) -> tuple[Tensor, Tensor]:
    if layout is None and inputs.documents is not None:
        layout = longspan.SequenceLayout.local(inputs.v.shape[1], inputs.documents)
    o, final = getattr(longspan, name)(
        inputs.q,
        inputs.k,
        inputs.v,
        **inputs.gates,
        scale=inputs.scale,
        initial_state=inputs.initial_state,
        output_final_state=True,
        layout=layout,
    )
    return o, final


def gradients(inputs: Inputs, o: Tensor, final: Tensor) -> dict[str, Tensor]:
    loss = (o * inputs.grad_o).sum() + (final * inputs.grad_final).sum()
    return dict(zip(inputs.leaf_names(), torch.autograd.grad(loss, inputs.leaves()), strict=True))


def with_values(inputs: Inputs, **values: Tensor) -> None:
    """Replace inputs by name."""
    for key, value in values.items():
        value = value.detach().clone().requires_grad_()
        if key in inputs.gates:
            inputs.gates[key] = value
        else:
            setattr(inputs, key, value)


def extremes(name: str, inputs: Inputs) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """What a user may give: gates that end everything, no β and twice of it, keys of nothing, keys that are all alike."""
    k, beta = inputs.k.detach(), inputs.gates["beta"].detach()
    unit = torch.nn.functional.normalize(k, dim=-1)
    for strength in (0.0, 1.0, 2.0):
        yield f"beta {strength}", {"k": unit, "beta": torch.full_like(beta, strength)}
        yield (
            f"equal keys, beta {strength}",
            {
                "k": unit[:, :1].expand_as(unit),
                "beta": torch.full_like(beta, strength),
            },
        )
    yield "zero keys", {"k": torch.zeros_like(k)}
    if name == "delta_rule":
        return
    g = inputs.gates["g"].detach()
    places = {"first": [0], "last": [-1], "tail": [min(64, g.shape[1] - 1)], "many": list(range(0, g.shape[1], 3))}
    for value in (-torch.inf, LEAST, -1e3):
        for where, tokens in places.items():
            one = g.clone()
            one[:, tokens] = value
            yield f"g {value} at {where}", {"g": one}
        yield f"g {value} everywhere", {"g": torch.full_like(g, value)}


@pytest.mark.slow_rows(r"-(63|64|65)-(delta_rule|kda)$")
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^False-(64|257)-", r"^True-(63|65|100)-")
@pytest.mark.parametrize("seq_len", LENGTHS)
@pytest.mark.parametrize("packed", [False, True])
def test_extreme_gates_and_keys_give_what_the_recurrence_gives(name: str, seq_len: int, packed: bool) -> None:
    documents = sorted({0, seq_len // 3, seq_len // 2, seq_len}) if packed else None
    one = make_inputs(name, seq_len, heads=1, key_size=4, value_size=3, documents=documents)
    cases = list(extremes(name, one))
    # Every case is a head of one call.
    inputs = make_inputs(name, seq_len, heads=len(cases), key_size=4, value_size=3, documents=documents)
    for key in ("k", *inputs.gates):
        own = inputs.k if key == "k" else inputs.gates[key]
        rows = [values.get(key, own[:, :, head : head + 1]) for head, (_, values) in enumerate(cases)]
        with_values(inputs, **{key: torch.cat(rows, dim=2)})
    o, final = call(name, inputs)
    expected_o, expected_final = reference(name, inputs)
    got = gradients(inputs, o, final) | {"o": o, "final": final}
    expected = gradients(inputs, expected_o, expected_final) | {"o": expected_o, "final": expected_final}
    for head, (label, _) in enumerate(cases):
        errors = {}
        for key, x in expected.items():
            dim = 1 if key in ("final", "initial_state") else 2
            errors[key] = relative_error(got[key].select(dim, head), x.select(dim, head), floor=1e-12)
        assert worst(errors) < 1e-9, (label, errors)


def plant(inputs: Inputs, key: str, token: int, value: float) -> None:
    """Put `value` into one entry of the last row and head of a token."""
    x = (inputs.gates[key] if key in inputs.gates else getattr(inputs, key)).detach().clone()
    x[-1, token].view(-1)[-1] = value
    with_values(inputs, **{key: x})


def planted(name: str, seq_len: int, dtype: torch.dtype) -> Iterator[tuple[str, int, float]]:
    generator = torch.Generator().manual_seed(seq_len)
    for key in ("q", "k", "v", "beta") + (() if name == "delta_rule" else ("g",)):
        for value in (-torch.inf, LEAST) if key == "g" else (torch.nan, torch.inf, -torch.inf, torch.finfo(dtype).max):
            yield key, int(torch.randint(seq_len, (), generator=generator)), value


@pytest.mark.slow_rows(r"-(63|64|65)-(delta_rule|kda)$")
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^dtype0-(100|257)-", r"^dtype1-(1|63|65|257)-", r"^dtype2-(1|64|65|100)-")
@pytest.mark.parametrize("seq_len", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_no_token_changes_an_earlier_output_by_what_is_not_finite(name: str, seq_len: int, dtype: torch.dtype) -> None:
    def made() -> Inputs:
        return make_inputs(name, seq_len, batch=2, heads=2, key_heads=1, key_size=8, value_size=8, dtype=dtype)

    plain = made()
    before, _ = call(name, plain)
    for key, token, value in planted(name, seq_len, dtype):
        inputs = made()
        plant(inputs, key, token, value)
        o, _ = call(name, inputs)
        if key == "g" or value == torch.finfo(dtype).max:
            # Other factors, or the system in float64: the same numbers, rounded otherwise.
            bound = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 8e-3}[dtype]
            assert relative_error(o[:, :token], before[:, :token]) <= bound, (key, token, value)
        else:
            assert torch.equal(o[:, :token], before[:, :token]), (key, token, value)
            assert not o[-1, token:, -1].isfinite().all(), (key, token, value)
        assert torch.equal(o[:-1], before[:-1]) or relative_error(o[:-1], before[:-1]) < 1e-2, (key, token, value)


@pytest.mark.slow_rows(r"-(63|64|65)-(delta_rule|kda)$")
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^0[.]3-(64|257)-", r"^30[.]0-(63|65|100)-")
@pytest.mark.parametrize("seq_len", LENGTHS)
@pytest.mark.parametrize("decay", [0.3, 30.0])
def test_no_upstream_gradient_that_is_not_finite_reaches_a_later_token(name: str, seq_len: int, decay: float) -> None:
    def made() -> Inputs:
        return make_inputs(name, seq_len, batch=2, heads=2, key_heads=1, key_size=8, value_size=8, decay=decay)

    plain = made()
    expected = gradients(plain, *call(name, plain))
    for token in sorted({0, seq_len // 2, min(64, seq_len - 1), seq_len - 1}):
        for value in (torch.nan, torch.inf):
            inputs = made()
            inputs.grad_o = inputs.grad_o.clone()
            inputs.grad_o[-1, token, -1, -1] = value
            got = gradients(inputs, *call(name, inputs))
            for key in ("q", "k", "v", *inputs.gates):
                later = got[key][:, token + 1 :]
                assert relative_error(later, expected[key][:, token + 1 :]) < 1e-12, (key, token, value)
                assert not got[key][-1, : token + 1].isfinite().all(), (key, token, value)
            assert relative_error(got["q"][:, :token], expected["q"][:, :token]) < 1e-12, (token, value)


@pytest.mark.parametrize("key", ["k", "v", "beta"])
def test_what_is_not_finite_reaches_the_gradients_that_hold_it_and_no_query_before_it(name: str, key: str) -> None:
    seq_len, token = 150, 70
    plain = make_inputs(name, seq_len, batch=2)
    expected = gradients(plain, *call(name, plain))
    inputs = make_inputs(name, seq_len, batch=2)
    plant(inputs, key, token, torch.nan)
    got = gradients(inputs, *call(name, inputs))
    assert relative_error(got["q"][:, :token], expected["q"][:, :token]) < 1e-12
    assert relative_error(got["v"][:, token + 1 :], expected["v"][:, token + 1 :]) < 1e-12
    assert not got["q"][-1, token:].isfinite().all()
    assert not got["k"][-1, : token + 1].isfinite().all() or key == "v"
    for other in got:
        assert relative_error(got[other][:-1], expected[other][:-1]) < 1e-12, other


def test_a_document_keeps_its_nan_to_itself(name: str) -> None:
    seq_len, documents = 100, [0, 7, 8, 30, 100]
    plain = make_inputs(name, seq_len, documents=documents)
    o, final = call(name, plain)
    expected = gradients(plain, o, final)
    for key in ("q", "k", "v", "beta"):
        inputs = make_inputs(name, seq_len, documents=documents)
        plant(inputs, key, 8, torch.nan)
        got_o, got_final = call(name, inputs)
        got = gradients(inputs, got_o, got_final)
        outside = torch.cat([torch.arange(8), torch.arange(30, 100)])
        assert torch.equal(got_o[:, outside], o[:, outside]), key
        assert torch.equal(got_final[[0, 1, 3]], final[[0, 1, 3]]), key
        for other in ("q", "k", "v", *inputs.gates):
            assert relative_error(got[other][:, outside], expected[other][:, outside]) < 1e-12, (key, other)


def _sharded(name: str, key: str | None, token: int, value: float) -> Tensor:
    inputs = make_inputs(name, 150, batch=2)
    if key is not None:
        plant(inputs, key, token, value)
    layout = longspan.SequenceLayout(150)
    gates = {gate.name: layout.shard(inputs.gates[gate.name]) for gate in VARIANTS[name].gates}
    o = getattr(longspan, name)(*(layout.shard(x) for x in (inputs.q, inputs.k, inputs.v)), **gates, layout=layout)
    return layout.gather(o).detach()


def _all_sharded(name: str) -> list[tuple[str, int, Tensor, Tensor]]:
    before = _sharded(name, None, 0, 0.0)
    found = []
    for key, token in (("k", 20), ("v", 74), ("beta", 75), ("k", 140), ("q", 100)):
        found.append((key, token, before, _sharded(name, key, token, torch.nan)))
    return found


def test_nothing_reaches_an_earlier_token_over_two_ranks(name: str) -> None:
    for results in run_on_ranks(2, _all_sharded, name):
        for key, token, before, after in results:
            assert torch.equal(after[:, :token], before[:, :token]), (key, token)
            assert not after[-1, token:].isfinite().all(), (key, token)
