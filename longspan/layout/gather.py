"""Tokens of all ranks brought together: what `SequenceLayout.gather` does over ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from longspan.comm.collectives import all_gather_single
from longspan.first_order import first_order
from longspan.tracing import unseen_by_checkpointing

if TYPE_CHECKING:
    from longspan.layout.sequence_layout import SequenceLayout


@unseen_by_checkpointing
def gather_tokens(layout: SequenceLayout, x: Tensor, dim: int) -> Tensor:
    """Tokens of all ranks in global order along dimension `dim`: see `SequenceLayout.gather`."""
    gathered: Tensor = _Gather.apply(x.movedim(dim, 0), layout)
    return gathered.movedim(0, dim)


class _Gather(torch.autograd.Function):
    """Gather tokens of all ranks in global order.

    | | shape | |
    |---|---|---|
    | x | [T_local, ...] | this rank's tokens |
    | y | [seq_len, ...] | y[position] = x_owner[local position] |

    Backward: dx = sum over ranks of their dy at this rank's positions, by one all-to-all and a local sum.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: SequenceLayout) -> Tensor:
        ctx.layout = layout
        longest = max(layout.tokens_of)
        padded = x.new_zeros((longest, *x.shape[1:]))
        padded[: x.shape[0]] = x
        out = x.new_empty((layout.num_ranks * longest, *x.shape[1:]))
        all_gather_single(out, padded, layout.group)
        return out.index_select(0, _global_order_on(layout, x.device))

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (dy,) = grads
        layout: SequenceLayout = ctx.layout
        longest = max(layout.tokens_of)
        sent = dy.new_zeros((layout.num_ranks * longest, *dy.shape[1:]))
        sent[_global_order_on(layout, dy.device)] = dy
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=layout.group)
        summed = received.view(layout.num_ranks, longest, *dy.shape[1:]).sum(0)
        return summed[: layout.num_local_tokens], None


def _global_order_on(layout: SequenceLayout, device: torch.device) -> Tensor:
    """Index of each global token in the ranks' tokens laid one after another, each rank padded to the longest."""

    def build() -> Tensor:
        longest = max(layout.tokens_of)
        index = torch.empty(layout.seq_len, dtype=torch.int64)
        for rank in range(layout.num_ranks):
            local = rank * longest
            for start, stop in layout.segments_of(rank):
                index[start:stop] = torch.arange(local, local + stop - start)
                local += stop - start
        return index

    return layout.on_device("global_order", device, build)
