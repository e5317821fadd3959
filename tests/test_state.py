"""The algebra of states: pairs are associative, scans are folds, adjoints are gradients, documents are zero transitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longspan.state import (
    ChannelDecay,
    Dense,
    Form,
    HeadDecay,
    Identity,
    LengthRates,
    Pair,
    Rates,
    ScalarDecay,
    Transition,
    exclusive_scan,
    exclusive_scan_adjoint,
)

STATE_SHAPE = (5, 2, 3, 4, 6)
RATES = Rates(-torch.rand(3, 4, generator=torch.Generator().manual_seed(6), dtype=torch.float64))
# Of channels, and of complex numbers of two channels each.
LENGTHS = LengthRates(RATES.rates)
TURNS = LengthRates(torch.complex(RATES.rates[:, :2], 3 * RATES.rates[:, 2:]))
KINDS: list[Form] = [Identity, HeadDecay, ScalarDecay, ChannelDecay, RATES, LENGTHS, TURNS, Dense]


def random_transition(kind: Form, seed: int = 0, documents_at: tuple[int, ...] = ()) -> Transition:
    generator = torch.Generator().manual_seed(seed)
    shape = kind.parameter_shape(STATE_SHAPE)
    parameter = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind is Identity:
        parameter = torch.zeros_like(parameter)
    elif isinstance(kind, Rates | LengthRates):
        parameter = parameter.abs()
    elif kind is not Dense:
        parameter = -parameter.abs()
    return kind(parameter).cut([index in documents_at for index in range(STATE_SHAPE[0])])


def random_states(seed: int = 1) -> Tensor:
    return torch.randn(STATE_SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def row(pair: Pair, index: int) -> Pair:
    return Pair(pair.transition[index], pair.state[index : index + 1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("documents_at", [(), (1,), (0, 2)])
def test_pairs_compose_associatively_and_as_functions(kind: Form, documents_at: tuple[int, ...]) -> None:
    pair = Pair(random_transition(kind, documents_at=documents_at), random_states())
    first, second, third = (row(pair, index) for index in range(3))
    left, right = third.after(second).after(first), third.after(second.after(first))
    torch.testing.assert_close(left.state, right.state)
    torch.testing.assert_close(left.transition.parameter, right.transition.parameter)
    state = random_states(2)[:1]
    torch.testing.assert_close(left.apply(state), third.apply(second.apply(first.apply(state))))


@pytest.mark.parametrize("kind", KINDS)
def test_a_stretch_in_which_a_document_starts_lets_nothing_through(kind: Form) -> None:
    transition = random_transition(kind, documents_at=(1, 4))
    out = transition.apply(random_states())
    for index in range(STATE_SHAPE[0]):
        assert bool((out[index] == 0).all()) == (index in (1, 4))
    assert not out.isnan().any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("documents_at", [(), (2,)])
def test_exclusive_scan_is_the_fold_of_the_pairs(kind: Form, documents_at: tuple[int, ...]) -> None:
    pair = Pair(random_transition(kind, documents_at=documents_at), random_states())
    initial = random_states(3)[0]
    incoming = exclusive_scan(pair, initial)
    state = initial.unsqueeze(0)
    for index in range(STATE_SHAPE[0]):
        torch.testing.assert_close(incoming[index : index + 1], state)
        state = row(pair, index).apply(state)
    torch.testing.assert_close(exclusive_scan(pair)[0], torch.zeros_like(initial))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("documents_at", [(), (2,)])
def test_the_adjoint_scan_and_the_outer_product_are_the_gradients_of_the_scan(
    kind: Form, documents_at: tuple[int, ...]
) -> None:
    transition = random_transition(kind, documents_at=documents_at)
    parameter = transition.parameter.clone().requires_grad_()
    states = random_states().requires_grad_()
    grad_in = random_states(4)
    incoming = exclusive_scan(Pair(kind(parameter), states))
    expected_states, expected_parameter = torch.autograd.grad((incoming * grad_in).sum(), [states, parameter])
    outgoing = exclusive_scan_adjoint(transition, grad_in)
    torch.testing.assert_close(outgoing, expected_states)
    torch.testing.assert_close(transition.outer(outgoing, incoming.detach()), expected_parameter)


@pytest.mark.parametrize("kind", KINDS)
def test_adjoint_is_the_transpose(kind: Form) -> None:
    transition = random_transition(kind)
    x, y = random_states(5), random_states(6)
    torch.testing.assert_close((transition.apply(x) * y).sum(), (x * transition.adjoint().apply(y)).sum())
