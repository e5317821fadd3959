"""Gradients of parameters over segments of time: summed in float32 where the parameters themselves have fewer digits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from longspan.parallel.sharded import is_divided

_FEW_DIGITS = (torch.bfloat16, torch.float16)


@contextmanager
def summed_in_float32(model: nn.Module, *, divided: bool = False) -> Iterator[None]:
    """In the block, what backward passes add to the gradients of bfloat16 and float16 parameters is summed in float32.

    A segment adds its part to ``grad``, and a sum in bfloat16 no longer grows by what is below 1/256 of it: with many segments the
    gradient would be another one than in one piece. Here the sum is rounded once, at the end of the block, and then added to the
    ``grad`` that was there before, as one backward would do. In the block ``grad`` is None, and the sum takes four bytes for each
    number.

    Weights that FSDP2 divides are left to it where it reduces once: it sums over segments in the ``reduce_dtype`` of its policy.
    Where it reduces after each of them (`divided`), what it adds to this rank's share is summed here as well.
    """
    sums: dict[nn.Parameter, Tensor] = {}

    @torch.no_grad()
    def take(parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter) and parameter.grad is not None
        if parameter in sums:
            sums[parameter] += parameter.grad
        else:
            sums[parameter] = parameter.grad.float()
        parameter.grad = None

    narrow = (p for p in model.parameters() if p.requires_grad and p.dtype in _FEW_DIGITS)
    taken = [p for p in narrow if divided or not is_divided(p)]
    before = [parameter.grad for parameter in taken]
    handles = [parameter.register_post_accumulate_grad_hook(take) for parameter in taken]
    for parameter in taken:
        parameter.grad = None
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, grad in zip(taken, before, strict=True):
            found = sums.pop(parameter, None)
            parameter.grad = grad if found is None else _added(grad, found.to(parameter.dtype))


@torch.no_grad()
def _added(grad: Tensor | None, found: Tensor) -> Tensor:
    return found if grad is None else grad.add_(found)
