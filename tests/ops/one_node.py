"""What a function that is one node of autograd promises: which gradients it makes, and what it keeps for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tests.compare import relative_error


def check_only_needed_gradients(
    function: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    upstream: Tensor,
    needed: tuple[int, ...],
) -> None:
    """Of the inputs, those at `needed` alone require a gradient: they get that of `plain`, and no other gets one."""
    for index, x in enumerate(inputs):
        x.requires_grad_(index in needed)
    function(*inputs).backward(upstream)
    want = torch.autograd.grad(plain(*inputs), [inputs[index] for index in needed], upstream)
    for index, x in enumerate(inputs):
        assert (x.grad is not None) == (index in needed)
    for index, expected in zip(needed, want, strict=True):
        grad = inputs[index].grad
        assert grad is not None and relative_error(grad, expected) < 1e-13


def check_keeps_inputs_alone(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
    """For backward the function keeps its inputs, and nothing that it has computed."""
    kept: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = function(*inputs)
    assert {x.data_ptr() for x in kept} == {x.data_ptr() for x in inputs}
    assert y.requires_grad
