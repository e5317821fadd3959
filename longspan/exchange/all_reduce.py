"""The sum over ranks as a differentiable exchange: every rank has a part, and every rank needs the sum."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from longspan.checks import check_tensor
from longspan.comm.collectives import all_reduce
from longspan.first_order import first_order
from longspan.layout import SequenceLayout, group_of
from longspan.layout.groups import resolve_group
from longspan.tracing import breaks_graphs, has_no_values, outside_graphs, unseen_by_checkpointing

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def sum_over_ranks(x: Tensor, group: SequenceLayout | dist.ProcessGroup | DeviceMesh | None = None) -> Tensor:
    """The sum of `x` over the ranks of `group`, on every rank, by one all-reduce; differentiable.

    Args:
        x: any shape and dtype, the same on every rank; summed in its dtype.
        group: whose ranks: a layout's; or a ProcessGroup, a DeviceMesh or None as `longspan.SequenceLayout` takes them.

    Returns:
        The shape and dtype of x; x itself where there is one rank.

    Its gradient is the sum of the gradients of all ranks: right where a rank's loss is its own share of the loss. A loss that every
    rank computes whole from the sum must be divided by the number of ranks. Every rank must take the same calls in the same order,
    backward too, and x must take a gradient on all of them or on none.

    Raises:
        InputError: for what is no tensor. LayoutError: for a group that does not exist, or that this rank is not in.
    """
    check_tensor("sum_over_ranks()", "x", x)
    if isinstance(group, SequenceLayout):
        if not has_no_values(x):
            group.check_group("sum_over_ranks()")
        process_group, num_ranks = group.group, group.num_ranks
    else:
        process_group, num_ranks, _, _ = resolve_group(group)
    if num_ranks == 1:
        return x
    if breaks_graphs():
        return _sum_outside_graphs(x, process_group)
    return x.clone() if has_no_values(x) else _sum(x, process_group)


def max_over_ranks(x: Tensor, layout: SequenceLayout) -> Tensor:
    """The largest of each entry of `x` over the layout's ranks, on every rank, by one all-reduce; it has no gradient."""
    if layout.num_ranks == 1 or has_no_values(x):
        return x.detach()
    return all_reduce(x.detach(), group_of(layout), "forward", dist.ReduceOp.MAX)


@unseen_by_checkpointing
def _sum(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    summed: Tensor = _SumOverRanks.apply(x, group)
    return summed


_sum_outside_graphs = outside_graphs(_sum)


class _SumOverRanks(torch.autograd.Function):
    """y = sum of x over the ranks, on every rank. Backward: ∂x = sum of ∂y over the ranks.

    | | shape |
    |---|---|
    | x, y | any |
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return all_reduce(x, group, "forward")

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grads[0], ctx.group, "backward"), None


class JoinSum(torch.autograd.Function):
    """A sum of which this rank's part takes no gradient: this rank joins the backward all-reduce, and drops its result.

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
