"""Feature maps have the kernels that their papers state, and gates are right where a naive formula is not."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal, getcontext

import pytest
import torch
from torch import Tensor

from longspan import features
from longspan.errors import InputError

getcontext().prec = 60

MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": features.identity,
    "elu_plus_one": features.elu_plus_one,
    "relu": features.relu,
    "unit_length": features.unit_length,
    "taylor": features.taylor,
    "rebased": features.Rebased(5, num_heads=2),
}
NUM_FEATURES = {"taylor": 1 + 5 + 15, "rebased": 15}
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rebased(num_heads: int | None) -> features.Rebased:
    """A map in float64 with random γ and β."""
    made = features.Rebased(5, num_heads).double()
    with torch.no_grad():
        made.gamma.copy_(normal(*made.gamma.shape, seed=1))
        made.beta.copy_(normal(*made.beta.shape, seed=2))
    return made


def test_elementwise_maps_have_their_formulas() -> None:
    x = torch.tensor([-3.0, -0.5, 0.0, 0.5, 3.0], dtype=torch.float64)
    torch.testing.assert_close(features.elu_plus_one(x), torch.nn.functional.elu(x) + 1)
    assert features.relu(x).tolist() == [0.0, 0.0, 0.0, 0.5, 3.0]
    assert features.identity(x) is x


def test_elu_plus_one_stays_above_zero_where_a_sum_with_one_would_not() -> None:
    x = torch.tensor([-30.0, -80.0])
    torch.testing.assert_close(features.elu_plus_one(x), x.exp(), rtol=1e-6, atol=0)


def test_unit_length_is_a_length_of_one() -> None:
    assert torch.allclose(features.unit_length(normal(2, 3, 4, 5), eps=0.0).norm(dim=-1), torch.ones(2, 3, 4).double())
    assert features.unit_length(torch.zeros(1, 5)).abs().max() == 0


@pytest.mark.parametrize("size", [1, 2, 5, 16])
def test_the_taylor_map_is_the_second_order_polynomial_of_its_paper(size: int) -> None:
    q, k = normal(2, 7, 3, size), normal(2, 7, 3, size, seed=1)
    phi_q, phi_k = features.taylor(q), features.taylor(k)
    assert phi_q.shape == (2, 7, 3, 1 + size + size * (size + 1) // 2)
    x = (q * k).sum(-1) / size**0.5
    torch.testing.assert_close((phi_q * phi_k).sum(-1), 1 + x + x**2 / 2, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_heads", [None, 3])
def test_the_rebased_map_is_the_learned_quadratic_kernel_of_its_paper(num_heads: int | None) -> None:
    phi = rebased(num_heads)
    q, k = normal(2, 7, 3, 5), normal(2, 7, 3, 5, seed=3)

    def moved(x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return phi.gamma * centred / (centred.square().mean(-1, keepdim=True) + phi.eps).sqrt() + phi.beta

    expected = (moved(q) * moved(k)).sum(-1).square() / 5
    torch.testing.assert_close((phi(q) * phi(k)).sum(-1), expected, rtol=1e-12, atol=1e-12)
    assert [name for name, _ in phi.named_parameters()] == ["gamma", "beta"]


def test_a_rebased_map_refuses_tensors_of_another_shape() -> None:
    with pytest.raises(InputError, match=r"takes tensors \[..., 3, 5\]; got \(1, 2, 2, 5\). Make it with the head_dim"):
        rebased(3)(torch.zeros(1, 2, 2, 5))
    with pytest.raises(InputError, match=r"takes tensors \[..., 5\]; got \(1, 2, 2, 4\)"):
        rebased(None)(torch.zeros(1, 2, 2, 4))


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_maps_keep_the_dtype_and_round_once(name: str, dtype: torch.dtype) -> None:
    x = normal(2, 9, 2, 5).to(dtype)
    phi = MAPS[name]
    got = phi(x)
    assert got.dtype == dtype
    assert got.shape == (2, 9, 2, NUM_FEATURES.get(name, 5))
    assert bool(got.isfinite().all())
    expected = phi(x.double())
    # One rounding is half a unit in the last place, eps / 2; what is computed in float32 before it adds its own few.
    tolerance = 0.5 * torch.finfo(dtype).eps + 8 * torch.finfo(torch.float32).eps
    assert ((got.double() - expected).abs() <= tolerance * expected.abs() + 1e-7).all()


@pytest.mark.parametrize("name", MAPS)
def test_gradients_of_maps(name: str) -> None:
    phi = rebased(2) if name == "rebased" else MAPS[name]
    assert torch.autograd.gradcheck(phi, (normal(1, 3, 2, 5).requires_grad_(),))


def test_gradients_of_a_rebased_maps_parameters() -> None:
    phi, x = rebased(None), normal(1, 3, 2, 5)
    names, values = zip(*phi.named_parameters(), strict=True)

    def function(*parameters: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(phi, dict(zip(names, parameters, strict=True)), (x,))
        return out

    assert torch.autograd.gradcheck(function, values)


EXTREME = [-1e4, -200.0, -90.0, -20.0, -1.0, -0.0, 0.0, 0.7, 20.0, 90.0, 200.0, 1e4]
MODERATE = [-60.0, -17.0, -3.0, -0.1, 0.0, 0.1, 3.0, 17.0, 60.0]
A_LOG = torch.tensor([-2.0, 0.0, 3.0])


def sigmoid(x: Decimal) -> Decimal:
    return 1 / (1 + (-x).exp())


def mamba2(x: Tensor) -> Tensor:
    return features.mamba2_log_decay(x.unsqueeze(-1), A_LOG)


def hgrn2(x: Tensor) -> Tensor:
    return torch.stack([features.hgrn2_log_decay(x, bound)[0] for bound in (0.0, 1e-6, 0.3, 0.999, 1.0)])


GATES: dict[str, Callable[[Tensor], Tensor]] = {"gla": features.gla_log_decay, "mamba2": mamba2, "hgrn2": hgrn2}


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_log_decays_are_float32_at_least_at_most_zero_and_finite(name: str, dtype: torch.dtype) -> None:
    x = torch.tensor(EXTREME, dtype=dtype, requires_grad=True)
    g = GATES[name](x)
    assert g.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert bool((g <= 0).all())
    assert bool(g.isfinite().all())
    (grad,) = torch.autograd.grad(g, x, normal(*g.shape).to(g.dtype))
    assert bool(grad.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_log_decays_are_exact_near_zero_and_far_from_it(dtype: torch.dtype) -> None:
    """Relative to each value: a decay of 1 − 1e-9 a token is half a memory after 700 million tokens, not none."""
    x = torch.tensor(MODERATE, dtype=dtype)
    logits = [Decimal(value) for value in x.tolist()]
    got, expected = [features.gla_log_decay(x, 16.0)], [[sigmoid(v).ln() / 16 for v in logits]]
    got.append(features.mamba2_log_decay(x, torch.tensor(1.5, dtype=dtype)))
    expected.append([-Decimal("1.5").exp() * (1 + v.exp()).ln() for v in logits])
    for bound in (0.0, 0.25, 0.9990234375):
        g, k = features.hgrn2_log_decay(x, bound)
        f = [Decimal(bound) + (1 - Decimal(bound)) * sigmoid(v) for v in logits]
        got += [g, k]
        expected += [[value.ln() for value in f], [1 - value for value in f]]
    # softplus passes arguments above 20 on unchanged, which is 1e-10 of their value.
    tolerance = 1e-6 if dtype == torch.float32 else 2e-10
    for values, reference in zip(got, expected, strict=True):
        exact = torch.tensor([float(value) for value in reference], dtype=torch.float64)
        torch.testing.assert_close(values.double(), exact, rtol=tolerance, atol=0)


def test_gradients_of_gates() -> None:
    x = torch.tensor(MODERATE, dtype=torch.float64).clamp(-20, 15).add(0.01).requires_grad_()
    assert torch.autograd.gradcheck(features.gla_log_decay, (x,))
    bias, rate = normal(1).requires_grad_(), normal(1, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda *values: features.mamba2_log_decay(*values), (x, rate, bias))
    for bound in (0.0, 0.2, 0.99):
        assert torch.autograd.gradcheck(lambda logits, b=bound: features.hgrn2_log_decay(logits, b), (x,))
    bounds = torch.linspace(0.05, 0.95, len(MODERATE), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(features.hgrn2_log_decay, (x, bounds))


def test_a_lower_bound_of_zero_among_others_is_no_special_case() -> None:
    """The lowest layer's bound is exactly 0 in HGRN2, perhaps in a tensor with those of the others."""
    x = torch.tensor([[-5.0, -1.0, 5.0]] * 2, requires_grad=True)
    bound = torch.tensor([[0.0], [0.5]], requires_grad=True)
    g, _ = features.hgrn2_log_decay(x, bound)
    torch.testing.assert_close(g[0], torch.nn.functional.logsigmoid(x[0]))
    grad_x, grad_bound = torch.autograd.grad(g.sum(), (x, bound))
    torch.testing.assert_close(grad_x[0], torch.sigmoid(-x[0]))
    torch.testing.assert_close(grad_bound[0], (-x[0]).exp().sum(0, keepdim=True))
    far = torch.full((1, 3), -1e4, requires_grad=True)
    grads = torch.autograd.grad(features.hgrn2_log_decay(far, bound)[0].sum(), (far, bound))
    assert all(bool(grad.isfinite().all()) for grad in grads)


@pytest.mark.parametrize("bound", [-0.1, 1.5, float("nan")])
def test_a_lower_bound_that_is_no_decay_is_refused(bound: float) -> None:
    with pytest.raises(
        InputError,
        match=r"lower_bound must be a (decay between 0 and 1|finite number); got .*Pass a number in \[0, 1\]",
    ):
        features.hgrn2_log_decay(torch.zeros(2), bound)


def test_hgrn2s_lower_bounds_rise_from_zero_with_depth() -> None:
    bounds = features.hgrn2_lower_bounds(torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0)))
    assert bounds.shape == (5, 2, 3)
    assert (bounds[0] == 0).all()
    assert (bounds.diff(dim=0) > 0).all()
    assert (bounds[-1] < 1).all()
    # Shares of 0.1, 0.2, 0.3 and 0.4.
    rising = features.hgrn2_lower_bounds(torch.arange(1.0, 5.0).log()[:, None])
    torch.testing.assert_close(rising[:, 0], torch.tensor([0.0, 0.2, 0.5, 0.9]))


def test_retnets_decays_are_those_of_its_paper() -> None:
    got = features.retnet_log_decay(8, dtype=torch.float64)
    torch.testing.assert_close(got.exp(), 1 - 2.0 ** -torch.arange(5, 13, dtype=torch.float64), rtol=1e-14, atol=0)
    assert features.retnet_log_decay(3).dtype == torch.float32


def test_lightning_attentions_decays_are_those_of_its_models() -> None:
    first = -features.lightning_log_decay(8, 0, 5, dtype=torch.float64)
    torch.testing.assert_close(first / (1 + 1e-5), 0.5 ** torch.arange(1, 9, dtype=torch.float64))
    third = -features.lightning_log_decay(8, 2, 5, dtype=torch.float64)
    torch.testing.assert_close(third, first / (1 + 1e-5) * (0.5 + 1e-5))
    last = -features.lightning_log_decay(8, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(last, first / (1 + 1e-5) * 1e-5)
    # Twelve heads: the slopes of eight, and every other one of sixteen.
    exponents = [1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5]
    got = -features.lightning_log_decay(12, dtype=torch.float64)
    expected = (1 + 1e-5) * 2.0 ** -torch.tensor(exponents, dtype=torch.float64)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("layer", [-1, 5])
def test_a_layer_that_does_not_exist_has_no_decay(layer: int) -> None:
    with pytest.raises(InputError, match=rf"layer must be one of 5 layers, 0 to 4; got {layer}"):
        features.lightning_log_decay(8, layer, 5)
