"""Mamba-2, HGRN2, RWKV-7 and normalized linear attention equal the plain recurrences of their papers in float64: outputs, states
and every gradient, on every rank."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import longspan
from longspan import features
from longspan.errors import InputError
from longspan.layout import SequenceLayout
from longspan.ops.variants import VARIANTS
from longspan.state import Dense
from tests.compare import relative_error, worst
from tests.ranks import run_on_ranks

Values = dict[str, Any]
Result = tuple[Tensor, Tensor]
PACKED = [0, 1, 2, 9, 20, 38, 41]
HEADS, KEY_HEADS, KEY_SIZE, VALUE_SIZE = 4, 2, 3, 5
TOLERANCE = 1e-11


def random_values(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


# Each layer: its inputs, its call, and its recurrence for one document. What has a token dimension is in PER_TOKEN.

PER_TOKEN = {"q", "k", "v", "g", "x", "dt", "B", "C", "z", "f", "i", "r", "w", "kappa", "a"}


def mamba2_values(batch: int, seq_len: int) -> Values:
    values = random_values(
        {
            "x": (batch, seq_len, HEADS, VALUE_SIZE),
            "dt": (batch, seq_len, HEADS),
            "A": (HEADS,),
            "B": (batch, seq_len, KEY_HEADS, KEY_SIZE),
            "C": (batch, seq_len, KEY_HEADS, KEY_SIZE),
            "D": (HEADS, VALUE_SIZE),
            "z": (batch, seq_len, HEADS, VALUE_SIZE),
            "dt_bias": (HEADS,),
        }
    )
    return {**values, "A": -values["A"].exp()}


def mamba2_call(values: Values, **options: Any) -> Any:
    return longspan.mamba2(**values, dt_softplus=True, **options)


LIMITS = (0.4, 1.1)


def limited_mamba2_call(values: Values, **options: Any) -> Any:
    return mamba2_call(values, dt_limit=LIMITS, **options)


def limited_mamba2_plain(x: Values, state: Tensor) -> Result:
    return mamba2_plain(x, state, LIMITS)


def mamba2_plain(x: Values, state: Tensor, limits: tuple[float, float] | None = None) -> Result:
    """h_t = exp(Δ_t A) h_{t−1} + Δ_t B_t x_t, y_t = C_tᵀ h_t + D x_t, gated by z."""
    outputs = []
    for t in range(x["x"].shape[1]):
        step = (1 + (x["dt"][:, t] + x["dt_bias"]).exp()).log()[..., None, None]
        if limits is not None:
            for limit, is_beyond in ((limits[0], step < limits[0]), (limits[1], step > limits[1])):
                step = torch.where(is_beyond, limit, step)
        # Head h belongs to group h // (H / G).
        key, query = (x[name][:, t].repeat_interleave(HEADS // KEY_HEADS, dim=1) for name in ("B", "C"))
        token = x["x"][:, t]
        state = (step * x["A"][:, None, None]).exp() * state + step * key[..., None] * token[..., None, :]
        y = torch.einsum("bhn,bhnp->bhp", query, state) + x["D"] * token
        outputs.append(y * x["z"][:, t] * torch.sigmoid(x["z"][:, t]))
    return torch.stack(outputs, dim=1), state


def hgrn2_values(batch: int, seq_len: int) -> Values:
    values = random_values(
        {
            "q": (batch, seq_len, HEADS, KEY_SIZE),
            "f": (batch, seq_len, HEADS, KEY_SIZE),
            "i": (batch, seq_len, HEADS, VALUE_SIZE),
            "lower_bound": (HEADS, KEY_SIZE),
        }
    )
    return {**values, "lower_bound": values["lower_bound"].sigmoid()}


def hgrn2_call(values: Values, **options: Any) -> Any:
    return longspan.hgrn2(**values, **options)


def hgrn2_plain(x: Values, state: Tensor) -> Result:
    """S_t = Diag(f_t) S_{t−1} + (1 − f_t) i_tᵀ, o_t = S_tᵀ q_t."""
    outputs = []
    for t in range(x["q"].shape[1]):
        f = x["lower_bound"] + (1 - x["lower_bound"]) * torch.sigmoid(x["f"][:, t])
        state = f[..., None] * state + (1 - f)[..., None] * x["i"][:, t, :, None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", x["q"][:, t], state))
    return torch.stack(outputs, dim=1), state


def rwkv7_values(batch: int, seq_len: int) -> Values:
    keys, values = (batch, seq_len, HEADS, KEY_SIZE), (batch, seq_len, HEADS, VALUE_SIZE)
    found = random_values({"r": keys, "w": keys, "k": keys, "v": values, "kappa": keys, "a": keys})
    decays = {"w": -math.exp(-0.5) * found["w"].sigmoid(), "a": found["a"].sigmoid()}
    return {**found, **decays, "kappa": torch.nn.functional.normalize(found["kappa"], dim=-1)}


def rwkv7_call(values: Values, **options: Any) -> Any:
    return longspan.rwkv7(**values, **options)


def rwkv7_plain(x: Values, state: Tensor) -> Result:
    """wkv_t = wkv_{t−1} (Diag(e^{w_t}) − κ_tᵀ (a_t ⊙ κ_t)) + v_tᵀ k_t, o_tᵀ = wkv_t r_tᵀ: vectors are rows, and the state lies on
    its side."""
    outputs, wkv = [], state.mT
    for t in range(x["r"].shape[1]):
        kappa, rate = x["kappa"][:, t], x["a"][:, t]
        removed = kappa[..., :, None] * (rate * kappa)[..., None, :]
        wkv = (
            wkv @ (torch.diag_embed(x["w"][:, t].exp()) - removed) + x["v"][:, t, :, :, None] * x["k"][:, t, :, None, :]
        )
        outputs.append(torch.einsum("bhvk,bhk->bhv", wkv, x["r"][:, t]))
    return torch.stack(outputs, dim=1), wkv.mT


def normalized_values(operator: str) -> Callable[[int, int], Values]:
    def make(batch: int, seq_len: int) -> Values:
        shapes: dict[str, tuple[int, ...]] = {
            "q": (batch, seq_len, KEY_HEADS, KEY_SIZE),
            "k": (batch, seq_len, KEY_HEADS, KEY_SIZE),
            "v": (batch, seq_len, HEADS, VALUE_SIZE),
        }
        gate_shapes = {"simple_gla": (batch, seq_len, HEADS), "gla": (batch, seq_len, HEADS, KEY_SIZE)}
        if operator in gate_shapes:
            shapes["g"] = gate_shapes[operator]
        values = random_values(shapes)
        values["q"], values["k"] = features.elu_plus_one(values["q"]), features.elu_plus_one(values["k"])
        if "g" in values:
            values["g"] = -values["g"].abs()
        return values

    return make


def normalized_call(operator: str) -> Callable[..., Any]:
    constants: dict[str, Any] = {}
    if operator == "retention":
        constants["log_decay"] = features.retnet_log_decay(HEADS, dtype=torch.float64)

    def call(values: Values, **options: Any) -> Any:
        return longspan.normalized_linear_attention(**values, **constants, operator=operator, eps=0.01, **options)

    return call


def normalized_plain(operator: str) -> Callable[[Values, Tensor], Result]:
    def plain(x: Values, state: Tensor) -> Result:
        """Numerator and denominator apart, each with the decay of its token."""
        sums, outputs = (state[..., :-1], state[..., -1]), []
        query, key = (x[name].repeat_interleave(HEADS // KEY_HEADS, dim=2) for name in ("q", "k"))
        for t in range(x["v"].shape[1]):
            decay = torch.ones(1, HEADS, 1, dtype=torch.float64)
            if operator == "retention":
                decay = (1 - 2.0 ** (-5 - torch.arange(HEADS, dtype=torch.float64)))[None, :, None]
            elif "g" in x:
                decay = x["g"][:, t].exp().view(x["g"].shape[0], HEADS, -1)
            numerator = decay[..., None] * sums[0] + key[:, t, :, :, None] * x["v"][:, t, :, None, :]
            sums = (numerator, decay * sums[1] + key[:, t])
            above = torch.einsum("bhk,bhkv->bhv", query[:, t], sums[0])
            below = torch.einsum("bhk,bhk->bh", query[:, t], sums[1])
            outputs.append(above / (below[..., None] + 0.01))
        return torch.stack(outputs, dim=1), torch.cat([sums[0], sums[1][..., None]], dim=-1)

    return plain


NORMALIZED = ("linear_attention", "retention", "simple_gla", "gla")
LAYERS: dict[str, tuple[Callable[[int, int], Values], Callable[..., Any], Callable[[Values, Tensor], Result], int]] = {
    "mamba2": (mamba2_values, mamba2_call, mamba2_plain, VALUE_SIZE),
    "mamba2 within limits": (mamba2_values, limited_mamba2_call, limited_mamba2_plain, VALUE_SIZE),
    "hgrn2": (hgrn2_values, hgrn2_call, hgrn2_plain, VALUE_SIZE),
    "rwkv7": (rwkv7_values, rwkv7_call, rwkv7_plain, VALUE_SIZE),
    **{
        f"normalized {operator}": (
            normalized_values(operator),
            normalized_call(operator),
            normalized_plain(operator),
            VALUE_SIZE + 1,
        )
        for operator in NORMALIZED
    },
}


def plain_result(layer: str, values: Values, initial: Tensor, documents: list[int] | None) -> Result:
    """The recurrence, document by document."""
    _, _, plain, _ = LAYERS[layer]
    if documents is None:
        return plain(values, initial)
    results = []
    for number, (start, stop) in enumerate(pairwise(documents)):
        own = {name: value[:, start:stop] if name in PER_TOKEN else value for name, value in values.items()}
        results.append(plain(own, initial[number : number + 1]))
    return torch.cat([o for o, _ in results], dim=1), torch.cat([state for _, state in results])


def errors_on_rank(layer: str, seq_len: int, order: Any, documents: list[int] | None) -> dict[str, float]:
    """Errors of this rank's outputs and gradients against the recurrence of the whole sequence."""
    make, call, _, value_size = LAYERS[layer]
    batch = 2 if documents is None else 1
    values = make(batch, seq_len)
    num_states = batch if documents is None else len(documents) - 1
    extra = random_values(
        {
            "initial": (num_states, HEADS, KEY_SIZE, value_size),
            "grad_o": (batch, seq_len, HEADS, VALUE_SIZE),
            "grad_final": (num_states, HEADS, KEY_SIZE, value_size),
        },
        seed=1,
    )
    names = [*values, "initial"]
    leaves = {**values, "initial": extra["initial"].abs()}
    for leaf in leaves.values():
        leaf.requires_grad_()
    o_plain, final_plain = plain_result(layer, {name: leaves[name] for name in values}, leaves["initial"], documents)
    loss = (o_plain * extra["grad_o"]).sum() + dist.get_world_size() * (final_plain * extra["grad_final"]).sum()
    expected = dict(zip(names, torch.autograd.grad(loss, [leaves[name] for name in names]), strict=True))

    layout = SequenceLayout(seq_len, order=order, documents=documents)
    own = {
        name: (layout.shard(leaf) if name in PER_TOKEN else leaf).detach().clone().requires_grad_()
        for name, leaf in leaves.items()
    }
    initial = own["initial"]
    o, final = call(
        {name: own[name] for name in values},
        layout=layout,
        initial_state=initial,
        output_final_state=True,
        chunk_size=8,
    )
    loss = (o * layout.shard(extra["grad_o"])).sum() + (final * extra["grad_final"]).sum()
    grads = dict(zip(names, torch.autograd.grad(loss, [own[name] for name in names]), strict=True))
    errors = {"o": relative_error(o, layout.shard(o_plain)), "final": relative_error(final, final_plain)}
    for name in names:
        if name in PER_TOKEN:
            errors[name] = relative_error(grads[name], layout.shard(expected[name]))
        else:
            # What is the same on every rank gets a share of its gradient there.
            total = grads[name].clone()
            dist.all_reduce(total)
            errors[name] = relative_error(total, expected[name])
    return errors


# The order of the tokens is that of the operators; here on as many ranks as have all kinds of bounds.
@pytest.mark.slow_rows(r"^zigzag-[12]-")
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^contiguous-2-(?!mamba2$)", r"^contiguous-3-(normalized|hgrn2$|mamba2 within limits$)")
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
def test_a_layer_equals_its_recurrence_on_every_rank(layer: str, num_ranks: int, order: str) -> None:
    for documents in (None, PACKED):
        for rank, errors in enumerate(run_on_ranks(num_ranks, errors_on_rank, layer, 41, order, documents)):
            assert len(errors) >= 6
            assert worst(errors) < TOLERANCE, (rank, documents, errors)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_state_carries_a_layer_from_prefill_to_single_tokens(layer: str) -> None:
    make, call, plain, value_size = LAYERS[layer]
    values = make(2, 20)
    nothing = torch.zeros(2, HEADS, KEY_SIZE, value_size, dtype=torch.float64)
    o_plain, final_plain = plain(values, nothing)

    def part(start: int, stop: int) -> Values:
        return {name: value[:, start:stop] if name in PER_TOKEN else value for name, value in values.items()}

    o, state = call(part(0, 15), output_final_state=True)
    outputs = [o]
    for t in range(15, 20):
        o, state = call(part(t, t + 1), initial_state=state, output_final_state=True)
        outputs.append(o)
    assert relative_error(torch.cat(outputs, dim=1), o_plain) < 1e-11
    assert relative_error(state, final_plain) < 1e-11


def test_weights_that_add_up_to_one_give_back_a_constant() -> None:
    values = normalized_values("linear_attention")(2, 30)
    values["v"] = torch.full_like(values["v"], 7.0)
    for causal in (True, False):
        o = longspan.normalized_linear_attention(**values, eps=0.0, causal=causal)
        torch.testing.assert_close(o, values["v"])


@pytest.mark.parametrize("operator", ["linear_attention", "retention"])
def test_every_token_reads_all_of_them_without_causality(operator: str) -> None:
    values = {name: value.requires_grad_() for name, value in normalized_values(operator)(1, 41).items()}
    call = normalized_call(operator)
    o = call(values, causal=False, layout=SequenceLayout.local(41, PACKED))
    positions = torch.arange(41, dtype=torch.float64)
    weights = torch.einsum(
        "bthk,bshk->bhts", *(values[name].repeat_interleave(HEADS // KEY_HEADS, dim=2) for name in ("q", "k"))
    )
    if operator == "retention":
        decay = features.retnet_log_decay(HEADS, dtype=torch.float64)[:, None, None]
        weights = weights * ((positions[:, None] - positions).abs() * decay).exp()
    document = torch.bucketize(positions, torch.tensor(PACKED[1:], dtype=torch.float64), right=True)
    weights = weights * (document[:, None] == document)
    expected = torch.einsum("bhts,bshv->bthv", weights / (weights.sum(-1, keepdim=True) + 0.01), values["v"])
    assert relative_error(o, expected) < 1e-12
    grad_o = random_values({"grad": o.shape}, seed=2)["grad"]
    leaves = list(values.values())
    for got, want in zip(
        torch.autograd.grad(o, leaves, grad_o), torch.autograd.grad(expected, leaves, grad_o), strict=True
    ):
        assert relative_error(got, want) < 1e-11


def test_what_is_written_is_read_later_and_more_than_once() -> None:
    values = normalized_values("linear_attention")(2, 30)
    memory = longspan.write_normalized(values["k"], values["v"], eps=0.01)
    other = features.elu_plus_one(random_values({"q": values["q"].shape}, seed=4)["q"])
    for q in (values["q"], other):
        expected = longspan.normalized_linear_attention(q, values["k"], values["v"], eps=0.01)
        torch.testing.assert_close(memory.read(q), expected)


def collectives_of_a_normalized_call() -> tuple[int, int, int]:
    layout = SequenceLayout(40)
    values: Values = {
        name: layout.shard(value).requires_grad_() for name, value in normalized_values("simple_gla")(2, 40).items()
    }
    with longspan.record_traffic() as traffic:
        o = longspan.normalized_linear_attention(**values, operator="simple_gla", exchange="all_gather", layout=layout)
        assert isinstance(o, Tensor)
        o.sum().backward()
    return traffic.count("forward"), traffic.count("backward"), traffic.num_collectives


def test_the_denominator_travels_in_the_same_exchange() -> None:
    assert run_on_ranks(2, collectives_of_a_normalized_call) == [(1, 1, 2)] * 2


@pytest.mark.parametrize("operator", [name for name, variant in VARIANTS.items() if variant.transition is Dense])
def test_an_operator_without_weights_is_refused(operator: str) -> None:
    x = torch.zeros(1, 4, 2, 3)
    with pytest.raises(InputError, match=rf"one of 'linear_attention', 'retention', .*; got '{operator}'"):
        longspan.normalized_linear_attention(x, x, x, operator=operator)
    with pytest.raises(InputError, match="got 'softmax'"):
        longspan.write_normalized(x, x, operator="softmax")


@pytest.mark.parametrize("phi", [features.elu_plus_one, features.taylor])
def test_a_normalized_output_in_bfloat16_stays_within_two_roundings_of_float64(phi: Callable[[Tensor], Tensor]) -> None:
    """A denominator of 2,000 tokens must not be summed in bfloat16, which would stop growing at 256."""
    values = random_values({"q": (1, 2000, 2, 16), "k": (1, 2000, 2, 16), "v": (1, 2000, 2, 32)})
    q, k, v = phi(values["q"]).bfloat16(), phi(values["k"]).bfloat16(), (values["v"] + 1).bfloat16()
    exact = longspan.normalized_linear_attention(q.double(), k.double(), v.double())
    got = longspan.normalized_linear_attention(q, k, v)
    assert isinstance(exact, Tensor)
    assert isinstance(got, Tensor)
    assert got.dtype == torch.bfloat16
    error = (got.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error < 4e-3


def test_mamba2_takes_groups_side_by_side_and_a_plain_d() -> None:
    values = mamba2_values(2, 12)
    values["D"] = values["D"][:, 0].contiguous()
    expected = mamba2_call({**values, "D": values["D"][:, None].expand(-1, VALUE_SIZE)})
    flat = {**values, "B": values["B"].flatten(2), "C": values["C"].flatten(2)}
    assert torch.equal(mamba2_call(flat, n_groups=KEY_HEADS), expected)
    assert torch.equal(mamba2_call(values, n_groups=KEY_HEADS), expected)


def test_mamba2_without_the_optional_arguments_is_the_bare_recurrence() -> None:
    values = mamba2_values(2, 12)
    bare = {name: values[name] for name in ("x", "dt", "A", "B", "C")}
    bare["dt"] = bare["dt"].abs()
    zero = torch.zeros(HEADS, dtype=torch.float64)
    # softplus and its inverse cancel, and so do a gate of z σ(z) = 1 and a D of 0.
    one = torch.full_like(values["z"], 1.2784645427610738)
    full = {**bare, "dt": bare["dt"].expm1().log(), "dt_bias": zero, "D": zero[:, None], "z": one}
    torch.testing.assert_close(longspan.mamba2(**bare), mamba2_plain(full, torch.zeros(()))[0])


def test_steps_beyond_the_limits_take_no_gradient() -> None:
    values = mamba2_values(1, 12)
    values["dt"].requires_grad_()
    mamba2_call(values, dt_limit=LIMITS).sum().backward()
    steps = torch.nn.functional.softplus(values["dt"].detach() + values["dt_bias"])
    beyond = (steps < LIMITS[0]) | (steps > LIMITS[1])
    assert 0 < beyond.sum() < beyond.numel()
    assert torch.equal(values["dt"].grad == 0, beyond)


def test_mamba2_in_bfloat16_keeps_its_steps_in_float32() -> None:
    values = {name: value.float() for name, value in mamba2_values(1, 300).items()}
    narrow = {name: values[name].bfloat16() for name in ("x", "B", "C", "z")}
    y = mamba2_call({**values, **narrow})
    exact = mamba2_call({name: value.double() for name, value in {**values, **narrow}.items()})
    assert y.dtype == torch.bfloat16
    assert ((y.double() - exact).square().mean() / exact.square().mean()).sqrt() < 5e-3
    nothing = torch.zeros(1, 300, 1, 3, dtype=torch.bfloat16)
    _, state = longspan.mamba2(
        nothing[..., :2],
        torch.full((1, 300, 1), 0.00123),
        torch.tensor([-1.234]),
        nothing,
        nothing,
        initial_state=torch.ones(1, 1, 3, 2),
        output_final_state=True,
    )
    torch.testing.assert_close(state, torch.full_like(state, -1.234 * 300 * 0.00123).exp(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(1, 6, 4)}, r"takes x \[B, T, H, P\]; got shape \(1, 6, 4\)"),
        ({"dt": torch.zeros(1, 6, 2)}, r"dt must be \[B, T, H\] = \(1, 6, 4\); got shape \(1, 6, 2\)"),
        ({"dt": torch.full((1, 6, 4), -9.0)}, r"dt must be at least 0; its smallest value is -[678].*dt_softplus=True"),
        ({"A": torch.ones(4)}, r"A must be at most 0, such as -torch.exp\(A_log\); got 1"),
        ({"A": torch.zeros(4, 3)}, r"A must be \[H\] = \(4,\); got shape \(4, 3\)"),
        ({"B": torch.zeros(1, 6, 3, 3)}, r"the 4 heads of x must be a multiple of the 3 groups of B"),
        ({"C": torch.zeros(1, 6, 6)}, r"C must be \[B, T, G, N\], or \[B, T, G \* N\] with n_groups G; got"),
        ({"n_groups": 4}, r"B must be .* with n_groups G; got shape \(1, 6, 2, 3\) and n_groups 4"),
        ({"D": torch.zeros(2)}, r"D must be \[H\] or \[H, P\] = \(4, 5\); got \(2,\)"),
        ({"z": torch.zeros(1, 6, 4, 1)}, r"z must be \[B, T, H, P\] = \(1, 6, 4, 5\)"),
        ({"dt_limit": 0.1}, r"dt_limit must be two numbers, the smallest and the largest step size; got 0.1 \(float\)"),
        ({"dt_limit": (0.1, None)}, r"dt_limit must be two numbers"),
        ({"dt_limit": (0.1, 0.01)}, r"dt_limit must rise from a number of at least 0; got \(0.1, 0.01\)"),
        ({"dt_limit": (-0.1, 1.0)}, r"dt_limit must rise from a number of at least 0"),
        ({"dt_limit": (float("nan"), 1.0)}, r"dt_limit must rise"),
        ({"dt_bias": torch.zeros(5)}, r"dt_bias must be \[H\] = \(4,\); got shape \(5,\)"),
    ],
)
def test_mamba2_refuses_what_does_not_fit(changes: dict[str, Any], message: str) -> None:
    values: dict[str, Any] = {name: value.float() for name, value in mamba2_values(1, 6).items()}
    values["dt"], values["dt_bias"] = values["dt"].abs(), values["dt_bias"].abs()
    with pytest.raises(InputError, match=message):
        longspan.mamba2(**{**values, **changes})


# HGRN2, RetNet, Lightning Attention.


def test_hgrn2_has_a_lower_bound_of_zero_unless_told() -> None:
    values = hgrn2_values(2, 12)
    del values["lower_bound"]
    zeros = torch.zeros(HEADS, KEY_SIZE, dtype=torch.float64)
    expected, _ = hgrn2_plain({**values, "lower_bound": zeros}, torch.zeros(()))
    torch.testing.assert_close(longspan.hgrn2(**values), expected)
