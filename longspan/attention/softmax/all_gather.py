"""Softmax attention with gathered keys and values (LASP-2H, arXiv 2502.07563), as a pair of autograd nodes.

Shapes: N global tokens, P ranks, T tokens of this rank, B batch, H heads, H_kv key and value heads, D head dimension.

    write    one all-gather of K and V, packed [T, B, 2, H_kv, D]: the ranks' shards laid end to end are the sequence
    read     blocks on own keys, then wait, then blocks on gathered keys; both merged by log-sum-exp

    read's backward     blocks on gathered keys, reduction of dK and dV started, then blocks on own keys
    write's backward    waits for the reduction

What runs between write and read (a query projection) hides the gather, and its backward hides the reduction. The
reduction is an all-to-all of the gradients that the mask leaves, summed where they arrive, in float32 and in the order
of the ranks: a reduce-scatter without the zeros (about half of its bytes when causal), for shards of any length.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from longspan.attention.softmax.blocks import Block, Plan, Run, plan_blocks
from longspan.attention.softmax.kernels import block_backward, block_forward
from longspan.collectives import all_gather_single
from longspan.exchange.traffic import note_collective, waiting
from longspan.layout import SequenceLayout


class GatheredMemory:
    """Keys and values of all ranks, on their way: what `write_softmax` returns.

    The gather was started when this was made; `attend` waits for it.
    """

    def __init__(self, k: Tensor, v: Tensor, layout: SequenceLayout, causal: bool) -> None:
        self.k, self.v, self.layout = k, v, layout
        self.plan = plan_blocks(layout, causal)
        self.exchange = _Exchange(layout, self.plan)
        self.ticket: Tensor | None = _StartGather.apply(k, v, self.exchange) if self.plan.exchanges else None

    def attend(self, q: Tensor, scale: float) -> Tensor:
        """Attention [B, T, H, D] of this rank's queries on every key that they may see."""
        out: Tensor = _Attend.apply(q, self.k, self.v, self.ticket, self.exchange, scale)
        return out


class _Exchange:
    """The collectives of one layer: the gather of its forward and the reduction of its backward."""

    def __init__(self, layout: SequenceLayout, plan: Plan) -> None:
        self.layout, self.plan = layout, plan
        self.num_reads = 0
        self._gather: tuple[Any, Tensor, Tensor] | None = None
        self._gathered: Tensor | None = None
        self._reductions: dict[int, tuple[Any, Tensor, Tensor]] = {}

    def start_gather(self, k: Tensor, v: Tensor) -> None:
        # gloo gathers equal lengths only: shards are padded to the longest. The padding is never read.
        longest = max(self.layout.tokens_of)
        mine = k.new_empty((longest, k.shape[0], 2, *k.shape[2:]))
        packed = mine[: k.shape[1]]
        packed[:, :, 0], packed[:, :, 1] = k.transpose(0, 1), v.transpose(0, 1)
        everyone = mine.new_empty((self.layout.num_ranks * longest, *mine.shape[1:]))
        note_collective("all_gather", "forward", (self.layout.num_ranks - 1) * mine.nbytes)
        self._gather = (all_gather_single(everyone, mine, self.layout.group, async_op=True), everyone, mine)

    def wait_gather(self) -> Tensor:
        """Keys and values in global order, [N, B, 2, H_kv, D]."""
        if self._gather is not None:
            work, everyone, _ = self._gather
            with waiting():
                work.wait()
            self._gather = None
            self._gathered = _in_global_order(everyone, self.layout)
        assert self._gathered is not None
        return self._gathered

    def start_reduction(self, read: int, grads: Tensor) -> None:
        """Send every rank its share of `grads` [span, B, 2, H_kv, D]: the gradients of the plan's `key_span`."""
        plan = self.plan
        offset = plan.key_span[0]
        mine = _runs(grads, [(a - offset, b - offset) for runs in plan.sends for a, b in runs])
        received = grads.new_empty((sum(map(_length, plan.receives)), *grads.shape[1:]))
        note_collective("all_to_all", "backward", mine.nbytes)
        work = dist.all_to_all_single(
            received,
            mine,
            [_length(runs) for runs in plan.receives],
            [_length(runs) for runs in plan.sends],
            group=self.layout.group,
            async_op=True,
        )
        self._reductions[read] = (work, received, mine)

    def wait_reductions(self, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """dk and dv [B, T, H_kv, D] of this rank's tokens, summed over the other ranks and over all reads."""
        num_rows, num_tokens = shape[:2]
        total: Tensor | None = None
        dtype = torch.float32
        while self._reductions:
            # In the order of the reads, the same on every rank.
            work, received, _ = self._reductions.pop(min(self._reductions))
            with waiting():
                work.wait()
            dtype = received.dtype
            if total is None:
                total = received.new_zeros(
                    (num_tokens, num_rows, 2, *shape[2:]), dtype=torch.promote_types(dtype, torch.float32)
                )
            start = 0
            for first, last in (run for runs in self.plan.receives for run in runs):
                total[first:last] += received[start : start + last - first]
                start += last - first
        assert total is not None
        dk, dv = total.to(dtype).transpose(0, 1).unbind(2)
        return dk, dv


class _StartGather(torch.autograd.Function):
    """First node of the pair: starts the gather; its backward ends the reduction.

    | | shape | |
    |---|---|---|
    | k, v | [B, T, H_kv, D] | this rank's keys and values |
    | ticket | [1] | ties the node to `_Attend`; carries no numbers |

    Forward: starts K = gather(k), V = gather(v). Backward: dk, dv = sum over the other ranks of their dK, dV at this
    rank's tokens; `_Attend` returns what this rank's own queries give.
    """

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange, ctx.shape = exchange, k.shape
        exchange.start_gather(k, v)
        return k.new_zeros(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _ticket: Tensor) -> tuple[Tensor, Tensor, None]:
        return *ctx.exchange.wait_reductions(ctx.shape), None


class _Attend(torch.autograd.Function):
    """Second node of the pair: waits for the gather and attends; its backward starts the reduction.

    | | shape | |
    |---|---|---|
    | q, o | [B, T, H, D] | this rank's queries and outputs |
    | k, v | [B, T, H_kv, D] | this rank's keys and values |
    | ticket | [1], or None | from `_StartGather`; None where no rank needs another's keys |
    | K, V | [B, N, H_kv, D] | all keys and values, from the gather |
    | lse | [B, H, T] | log-sum-exp over all keys that a query sees, saved for backward |

    Forward: o_i = softmax_j(scale · q_i·K_j) V_j over the keys j that i sees. Backward: P = exp(scale · q Kᵀ − lse)
    and delta = rowsum(do ⊙ o): dV = Pᵀ do, dS = P ⊙ (do Vᵀ − delta), dq = scale · dS K, dK = scale · dSᵀ q.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, ticket: Tensor | None, exchange: _Exchange, scale: float
    ) -> Tensor:
        plan = exchange.plan
        merged = _Merged(q)
        for block in plan.local:
            merged.add(block, *_forward(block, q, k, v, scale))
        keys_and_values: tuple[Tensor, ...] = (k, v)
        if ticket is not None:
            gathered = exchange.wait_gather()
            keys, values = _keys_and_values(gathered)
            for block in plan.gathered:
                merged.add(block, *_forward(block, q, keys, values, scale))
            # Own keys are among the gathered ones: backward does not keep them twice.
            keys_and_values = (gathered,)
        out, lse = merged.out, merged.lse
        ctx.save_for_backward(q, out, lse, *keys_and_values)
        ctx.exchange, ctx.scale, ctx.read = exchange, scale, exchange.num_reads
        exchange.num_reads += 1
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None, None, None]:
        q, out, lse, *keys_and_values = ctx.saved_tensors
        exchange, scale = ctx.exchange, ctx.scale
        plan: Plan = exchange.plan
        if len(keys_and_values) == 2:
            k, v = keys_and_values
            if len(plan.local) == 1:
                return (
                    *block_backward(grad_out, q, k, v, out, lse, causal=plan.local[0].causal, scale=scale),
                    None,
                    None,
                    None,
                )
            dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
            for block in plan.local:
                queries, keys = slice(block.query_start, block.query_stop), slice(block.key_start, block.key_stop)
                dq[:, queries], dk[:, keys], dv[:, keys] = _backward(block, grad_out, q, k, v, out, lse, scale)
            return dq, dk, dv, None, None, None

        (gathered,) = keys_and_values
        all_keys, all_values = _keys_and_values(gathered)
        first, last = plan.key_span
        wire = gathered.dtype
        dq = torch.zeros_like(q, memory_format=torch.contiguous_format)
        span = gathered.new_zeros((last - first, *gathered.shape[1:]), dtype=torch.promote_types(wire, torch.float32))
        for block in plan.gathered:
            block_dq, *block_dkv = _backward(block, grad_out, q, all_keys, all_values, out, lse, scale)
            dq[:, block.query_start : block.query_stop] += block_dq
            for slot, grad in enumerate(block_dkv):
                span[block.key_start - first : block.key_stop - first, :, slot] += grad.transpose(0, 1)
        ticket_grad = None
        if ctx.needs_input_grad[3]:
            exchange.start_reduction(ctx.read, span.to(wire))
            ticket_grad = gathered.new_zeros(1)

        own = span.new_zeros((q.shape[1], *span.shape[1:]))
        for (start, stop), (local_start, local_stop) in plan.owns:
            own[local_start:local_stop] += span[start - first : stop - first]
        local_keys, local_values = _keys_and_values(_runs(gathered, list(plan.segments)))
        for block in plan.local:
            queries, keys = slice(block.query_start, block.query_stop), slice(block.key_start, block.key_stop)
            block_dq, *block_dkv = _backward(block, grad_out, q, local_keys, local_values, out, lse, scale)
            dq[:, queries] += block_dq
            for slot, grad in enumerate(block_dkv):
                own[keys, :, slot] += grad.transpose(0, 1)
        dk, dv = own.to(wire).transpose(0, 1).unbind(2)
        return dq, dk, dv, ticket_grad, None, None


class _Merged:
    """Outputs and log-sum-exp of a rank's queries, as blocks of keys come in."""

    def __init__(self, q: Tensor) -> None:
        self._q = q
        self._merged: tuple[Tensor, Tensor] | None = None
        self._written: set[Run] = set()

    @property
    def out(self) -> Tensor:
        """[B, T, H, D]"""
        return self._tensors()[0]

    @property
    def lse(self) -> Tensor:
        """[B, H, T]"""
        return self._tensors()[1]

    def add(self, block: Block, out: Tensor, lse: Tensor) -> None:
        """Merge what `block`'s queries got from its keys: out [B, Tq, H, D] and lse [B, H, Tq]."""
        run = (block.query_start, block.query_stop)
        if run == (0, self._q.shape[1]) and self._merged is None:
            # The only block of these queries so far, and they are all queries: nothing to copy.
            self._merged = (out, lse)
            self._written.add(run)
            return
        all_out, all_lse = self._tensors()
        run_out, run_lse = all_out[:, run[0] : run[1]], all_lse[..., run[0] : run[1]]
        if run not in self._written:
            self._written.add(run)
            run_out.copy_(out)
            run_lse.copy_(lse)
            return
        total = torch.logaddexp(run_lse, lse)
        weights = ((x - total).exp().transpose(1, 2).unsqueeze(-1) for x in (run_lse, lse))
        run_out.copy_(run_out * next(weights) + out * next(weights))
        run_lse.copy_(total)

    def _tensors(self) -> tuple[Tensor, Tensor]:
        if self._merged is None:
            q = self._q
            dtype = torch.promote_types(q.dtype, torch.float32)
            self._merged = (
                torch.empty_like(q, memory_format=torch.contiguous_format),
                q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=dtype),
            )
        return self._merged


def _forward(block: Block, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    queries, keys = slice(block.query_start, block.query_stop), slice(block.key_start, block.key_stop)
    return block_forward(q[:, queries], k[:, keys], v[:, keys], causal=block.causal, scale=scale)


def _backward(
    block: Block, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    queries, keys = slice(block.query_start, block.query_stop), slice(block.key_start, block.key_stop)
    return block_backward(
        grad_out[:, queries],
        q[:, queries],
        k[:, keys],
        v[:, keys],
        out[:, queries],
        lse[..., queries],
        causal=block.causal,
        scale=scale,
    )


def _keys_and_values(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Views [B, tokens, H_kv, D] of packed keys and values [tokens, B, 2, H_kv, D]."""
    keys, values = packed.transpose(0, 1).unbind(2)
    return keys, values


def _in_global_order(everyone: Tensor, layout: SequenceLayout) -> Tensor:
    """The ranks' shards [P · longest, ...], each padded to the longest, as one sequence [N, ...]."""
    longest = max(layout.tokens_of)
    runs: list[tuple[int, Run]] = []
    for rank in range(layout.num_ranks):
        offset = rank * longest
        for start, stop in layout.segments_of(rank):
            runs.append((start, (offset, offset + stop - start)))
            offset += stop - start
    return _runs(everyone, [run for _, run in sorted(runs)])


def _runs(x: Tensor, runs: list[Run]) -> Tensor:
    """The rows of `runs` one after another; a view where they already lie so."""
    runs = [(start, stop) for start, stop in runs if start < stop]
    if not runs:
        return x[:0]
    if all(left[1] == right[0] for left, right in pairwise(runs)):
        return x[runs[0][0] : runs[-1][1]]
    return torch.cat([x[start:stop] for start, stop in runs])


def _length(runs: tuple[Run, ...]) -> int:
    return sum(stop - start for start, stop in runs)
