"""A computation whose channels know nothing of each other, some channels at a time, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from longspan.autocast import without_autocast
from longspan.first_order import first_order


def by_channels(
    function: Callable[..., Tensor], block: int, dims: Sequence[int], dim_of_result: int, *tensors: Tensor
) -> Tensor:
    """``function(*tensors)``, `block` channels at a time; backward computes it again, so that nothing but the tensors is kept.

    Args:
        function: of the tensors, or of the same range of channels of all of them; differentiable.
        block: channels that are computed together, at least 1.
        dims: which dimension of each tensor is that of channels.
        dim_of_result: which of the result.
    """
    result: Tensor = _ByChannels.apply(function, block, tuple(dims), dim_of_result, *tensors)
    return result


class _ByChannels(torch.autograd.Function):
    """See `by_channels`.

    | | shape | |
    |---|---|---|
    | tensors | any, with a dimension of C channels | |
    | result | any, with a dimension of C channels | |

    Backward: that of the function, for each block of channels by itself.
    """

    @staticmethod
    def forward(
        ctx: Any, function: Callable[..., Tensor], block: int, dims: tuple[int, ...], dim: int, *tensors: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.call = function, block, dims, dim
        num_channels = tensors[0].shape[dims[0]]
        result: Tensor | None = None
        for start in range(0, num_channels, block):
            size = min(block, num_channels - start)
            part = function(*(x.narrow(d, start, size) for x, d in zip(tensors, dims, strict=True)))
            if result is None:
                result = part.new_empty([num_channels if d == dim else n for d, n in enumerate(part.shape)])
            result.narrow(dim, start, size).copy_(part)
        assert result is not None
        return result

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        function, block, dims, dim = ctx.call
        wanted = ctx.needs_input_grad[4:]
        grads = [torch.zeros_like(x) if is_wanted else None for x, is_wanted in zip(tensors, wanted, strict=True)]
        num_channels = tensors[0].shape[dims[0]]
        for start in range(0, num_channels, block):
            size = min(block, num_channels - start)
            with torch.enable_grad(), without_autocast(grad):
                parts = [x.narrow(d, start, size).detach() for x, d in zip(tensors, dims, strict=True)]
                for part, is_wanted in zip(parts, wanted, strict=True):
                    part.requires_grad_(is_wanted)
                result = function(*parts)
            leaves = [part for part, is_wanted in zip(parts, wanted, strict=True) if is_wanted]
            found = iter(torch.autograd.grad(result, leaves, grad.narrow(dim, start, size), allow_unused=True))
            for total, d in zip(grads, dims, strict=True):
                part_grad = None if total is None else next(found)
                if total is not None and part_grad is not None:
                    total.narrow(d, start, size).copy_(part_grad)
        return None, None, None, None, *grads
