"""Gradients of bfloat16 weights are summed over segments of time in float32, and rounded once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from longspan.streaming.gradients import summed_in_float32

SMALL = 2.0**-10
"""What a sum of 1 in bfloat16 does not grow by."""


def add(weights: nn.Module, numbers: list[float]) -> None:
    """Backward passes, one after another, each of which gives every weight a number."""
    for number in numbers:
        torch.stack([(parameter * number).sum() for parameter in weights.parameters()]).sum().backward()


def grads_of(weights: nn.Module) -> list[Tensor]:
    found = [parameter.grad for parameter in weights.parameters() if parameter.grad is not None]
    assert len(found) == 2
    return found


def weights_of(dtype: torch.dtype) -> nn.ParameterList:
    return nn.ParameterList([nn.Parameter(torch.ones(3, dtype=dtype)), nn.Parameter(torch.ones(2))])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_many_small_parts_are_not_lost(dtype: torch.dtype) -> None:
    weights, plain = weights_of(dtype), weights_of(dtype)
    numbers = [1.0, *[SMALL] * 512]
    add(plain, numbers)
    with summed_in_float32(weights):
        add(weights, numbers)
    for parameter, grad in zip(weights.parameters(), grads_of(weights), strict=True):
        assert grad.dtype == parameter.dtype and torch.equal(grad, torch.full_like(grad, 1.5))
    if dtype == torch.bfloat16:
        assert torch.equal(grads_of(plain)[0], torch.ones(3, dtype=dtype))


def test_they_are_added_to_what_was_there_and_to_nothing_afterwards() -> None:
    weights = weights_of(torch.bfloat16)
    add(weights, [4.0])
    before = grads_of(weights)
    with summed_in_float32(weights):
        add(weights, [1.0, 2.0])
    add(weights, [0.5])
    for grad, same in zip(grads_of(weights), before, strict=True):
        assert grad is same and torch.equal(grad, torch.full_like(grad, 7.5))


class StoppedError(Exception):
    pass


def test_what_ends_early_leaves_what_it_has() -> None:
    weights = weights_of(torch.bfloat16)
    frozen = weights_of(torch.bfloat16).requires_grad_(False)
    with pytest.raises(StoppedError), summed_in_float32(nn.ModuleList([weights, frozen])):
        add(weights, [1.0])
        raise StoppedError
    assert all(torch.equal(grad, torch.ones_like(grad)) for grad in grads_of(weights))
    assert all(parameter.grad is None for parameter in frozen.parameters())
