"""The sum over ranks as a differentiable exchange: what all of them need the same of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longspan.comm.collectives import all_reduce
from longspan.first_order import first_order
from longspan.layout import SequenceLayout, group_of


def sum_over_ranks(x: Tensor, layout: SequenceLayout) -> Tensor:
    """The sum of `x` over the layout's ranks, on every rank; its gradient is summed over them too."""
    summed: Tensor = _SumOverRanks.apply(x, layout)
    return summed


class _SumOverRanks(torch.autograd.Function):
    """y = sum of x over the ranks, on every rank. Backward: ∂x = sum of ∂y over the ranks.

    | | shape |
    |---|---|
    | x, y | any |
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: SequenceLayout) -> Tensor:
        ctx.layout = layout
        return all_reduce(x, group_of(layout), "forward")

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grads[0], group_of(ctx.layout), "backward"), None


class JoinSum(torch.autograd.Function):
    """What `sum_over_ranks` returned where this rank's part takes no gradient; joins the sum's backward, whose result it drops.

    | | shape | |
    |---|---|---|
    | x, y | any | y = x |
    | leaf | [] | takes a gradient, so that the node is in the graph |
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, leaf: Tensor, layout: SequenceLayout) -> Tensor:
        ctx.layout = layout
        return x.detach()

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        all_reduce(grads[0], group_of(ctx.layout), "backward")
        return None, None, None
