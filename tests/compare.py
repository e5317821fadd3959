"""How far a result is from what it should be; a NaN or an infinity on one side alone is an infinite error.

Python's ``max`` drops NaN unless it comes first, so that a test written with it passes whatever a NaN hides in. Every test
compares by these functions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

INFINITE = float("inf")

Key = TypeVar("Key")


def relative_error(got: Tensor, want: Tensor, floor: float = 0.0) -> float:
    """The largest difference in units of the largest finite expected value plus `floor`.

    Args:
        got, want: the same shape, any dtypes; compared in float64.
        floor: size below which a difference does not count in full: what the case rounds away, not what makes it pass.

    NaN equals NaN, an infinity the same infinity; where one side alone has one, or the shapes differ, the error is infinite.
    """
    if got.shape != want.shape:
        return INFINITE
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    if got.numel() == 0:
        return 0.0
    finite = torch.isfinite(want)
    if not torch.equal(finite, torch.isfinite(got)):
        return INFINITE
    if not torch.equal(got[~finite].nan_to_num(nan=0.5), want[~finite].nan_to_num(nan=0.5)):
        return INFINITE
    if not finite.any():
        return 0.0
    difference = float((got[finite] - want[finite]).abs().max())
    size = float(want[finite].abs().max()) + floor
    if difference == 0.0:
        return 0.0
    return difference / size if size > 0.0 else INFINITE


def worst(errors: Iterable[float | Tensor] | Mapping[Any, float]) -> float:
    """The largest of `errors` (the values of a mapping), at least one; NaN counts as infinite."""
    values = [float(error) for error in (errors.values() if isinstance(errors, Mapping) else errors)]
    if not values:
        raise ValueError("no errors to compare: a test that compares nothing cannot fail")
    return max(INFINITE if value != value else value for value in values)


def worst_of(errors: Mapping[Key, float]) -> tuple[float, Key]:
    """The largest of `errors`, at least one, and what it is the error of; NaN counts as infinite."""
    largest = worst(errors)
    return largest, next(key for key, error in errors.items() if error == largest or error != error)
