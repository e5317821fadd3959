from __future__ import annotations

import pytest
import torch

from tests.compare import INFINITE, relative_error, worst

NAN = float("nan")


@pytest.mark.parametrize("value", [NAN, INFINITE, -INFINITE])
@pytest.mark.parametrize("position", range(6))
def test_what_is_not_finite_on_one_side_alone_is_an_infinite_error_wherever_it_stands(
    value: float, position: int
) -> None:
    want = torch.arange(1.0, 7.0).view(2, 3)
    planted = want.clone()
    planted.view(-1)[position] = value
    assert relative_error(planted, want) == INFINITE
    assert relative_error(want, planted) == INFINITE
    assert relative_error(planted, planted.clone()) == 0.0


def test_infinities_of_opposite_sign_and_nan_beside_infinity_differ() -> None:
    values = [NAN, INFINITE, -INFINITE]
    for got in values:
        for want in values:
            same = got == want or (got != got and want != want)
            error = relative_error(torch.tensor([1.0, got]), torch.tensor([1.0, want]))
            assert error == (0.0 if same else INFINITE), (got, want)


def test_errors_are_relative_to_the_tensor_however_small() -> None:
    want = torch.tensor([1e-12, -2e-12], dtype=torch.float64)
    assert relative_error(want * 1.5, want) == pytest.approx(0.5)
    assert relative_error(want * 1.5, want, floor=1.0) < 1e-11


def test_anything_beside_zeros_is_an_infinite_error() -> None:
    assert relative_error(torch.full((2,), 1e-300, dtype=torch.float64), torch.zeros(2)) == INFINITE
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0.0


def test_other_shapes_differ() -> None:
    assert relative_error(torch.ones(2, 1), torch.ones(1, 2)) == INFINITE
    assert relative_error(torch.ones(0, 1), torch.ones(0, 1)) == 0.0


@pytest.mark.parametrize("position", range(3))
def test_nan_is_the_worst_error_wherever_it_stands(position: int) -> None:
    errors = [1e-15, 1.0, 2.0]
    assert worst(errors) == 2.0
    errors[position] = NAN
    assert worst(errors) == INFINITE
    assert worst(dict(enumerate(errors))) == INFINITE


def test_no_errors_at_all_are_refused() -> None:
    with pytest.raises(ValueError, match="no errors to compare"):
        worst([])
