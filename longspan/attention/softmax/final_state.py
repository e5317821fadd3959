"""The keys and values that later tokens see: of the past and of this sequence, on every rank.

Shapes: N global tokens, T tokens of this rank, n last tokens of the sequence, L tokens of the past, B batch, H_kv key and value
heads, D head dimension, D_v that of values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longspan.attention.softmax.packing import add_packed, pack_into, pack_keys, packed_width, take_runs, unpack
from longspan.comm.all_to_all import Flight, start_all_to_all
from longspan.comm.collectives import all_gather_single
from longspan.comm.numbering import launch
from longspan.comm.traffic import note_collective
from longspan.dtypes import at_least_float32
from longspan.first_order import first_order
from longspan.layout import SequenceLayout, group_of
from longspan.layout.visibility import Run, intersection, length, located

KeysAndValues = tuple[Tensor, Tensor]


def final_keys(
    k: Tensor, v: Tensor, past: KeysAndValues | None, layout: SequenceLayout, window: int | None, joins: bool
) -> KeysAndValues:
    """Keys ``[B, L + N, H_kv, D]`` and values ``[B, L + N, H_kv, D_v]`` of all tokens so far, or of the last ``window - 1``.

    Of those of the last document. On every rank.

    joins: take part in the gradients' exchange even if k and v take none here: those of other ranks may.
    """
    kept = None if window is None else window - 1
    of_document = layout.seq_len - layout.document_bounds[-2]
    num_last = of_document if kept is None else min(kept, of_document)
    if layout.num_ranks > 1 and num_last > 0:
        leaf = k.new_zeros((), requires_grad=True) if joins and not (k.requires_grad or v.requires_grad) else None
        last_k, last_v = _LastTokens.apply(k, v, leaf, layout, num_last)
    else:
        last_k, last_v = (x[:, x.shape[1] - num_last :] for x in (k, v))
    if past is None or layout.num_documents > 1:
        # Tensors of their own: these are kept longer than what they were taken from.
        return (last_k, last_v) if layout.num_ranks > 1 else (last_k.clone(), last_v.clone())
    num_past = past[0].shape[1] if kept is None else min(past[0].shape[1], kept - num_last)
    k_past, v_past = (x[:, x.shape[1] - num_past :] for x in past)
    return torch.cat([k_past, last_k], dim=1), torch.cat([v_past, last_v], dim=1)


@dataclass(frozen=True)
class _Plan:
    """How the last tokens are brought together.

    own: this rank's, as runs of its tokens. longest: number of tokens of the rank that has most of them. arrivals: the runs of
    what arrives, shards padded to the longest, that make the last tokens. places: of each rank's tokens among the last ones.
    """

    own: tuple[Run, ...]
    longest: int
    arrivals: tuple[Run, ...]
    places: tuple[tuple[Run, ...], ...]


def _plan(layout: SequenceLayout, num_last: int) -> _Plan:
    last = [(layout.seq_len - num_last, layout.seq_len)]
    held = [intersection(layout.segments_of(rank), last) for rank in range(layout.num_ranks)]
    longest = max(map(length, held))
    arriving = [run for own in held for run in (*own, (length(own) - longest, 0))]
    return _Plan(
        own=tuple(located(held[layout.rank], layout.segments)),
        longest=longest,
        arrivals=tuple(located(last, arriving)),
        places=tuple(tuple(located(own, last)) for own in held),
    )


class _LastTokens(torch.autograd.Function):
    """Keys and values of the last tokens of the sequence, gathered on every rank.

    | | shape | |
    |---|---|---|
    | k, v | [B, T, H_kv, D], [B, T, H_kv, D_v] | this rank's |
    | joins | [] or None | a leaf, where k and v take no gradient but other ranks' may |
    | last_k, last_v | [B, n, H_kv, D], [B, n, H_kv, D_v] | the same on every rank |

    Backward: dk, dv = sum over the ranks of their gradients of this rank's tokens, in float32 (float64), in the order of the ranks.
    """

    @staticmethod
    def forward(
        ctx: Any, k: Tensor, v: Tensor, joins: Tensor | None, layout: SequenceLayout, num_last: int
    ) -> tuple[Tensor, Tensor]:
        plan = layout.cached(("softmax_last_tokens", num_last), lambda: _plan(layout, num_last))
        ctx.layout, ctx.plan, ctx.shapes = layout, plan, (k.shape, v.shape)
        mine = k.new_zeros((plan.longest, k.shape[0], packed_width(k, v)))
        pack_into(mine, k, v, plan.own)
        everyone = mine.new_empty((layout.num_ranks * plan.longest, *mine.shape[1:]))
        others = layout.num_ranks - 1
        note_collective("all_gather", "forward", others * mine.nbytes, others)
        work = launch(
            group_of(layout),
            mine.device,
            "last keys and values",
            "forward",
            lambda group, _: all_gather_single(everyone, mine, group, async_op=True),
        )
        last_k, last_v = unpack(take_runs(Flight(work, everyone, mine).wait(), plan.arrivals), k, v)
        return last_k.contiguous(), last_v.contiguous()

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        layout: SequenceLayout = ctx.layout
        plan: _Plan = ctx.plan
        dk, dv = grads
        sizes = [length(places) for places in plan.places]
        sent = pack_keys(dk, dv, [run for places in plan.places for run in places])
        own = length(plan.own)
        arrived = start_all_to_all(sent, sizes, [own] * layout.num_ranks, group_of(layout), "backward").wait()
        totals = tuple(at_least_float32(dk.new_zeros(shape)) for shape in ctx.shapes)
        for share in arrived.split(own) if own else ():
            add_packed((totals[0], totals[1]), plan.own, share)
        return totals[0].to(dk.dtype), totals[1].to(dv.dtype), None, None, None
