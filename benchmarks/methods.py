"""Ways to split attention over ranks, as functions of a rank's q, k and v: what figures and tables compare.

Shapes: q, k, v, o ``[1, T, H, D]``, T tokens of a rank, all H heads.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import longspan
from benchmarks.harness import require_close, seconds_of_slowest
from longspan.comm.traffic import Traffic, note_collective, record_traffic, waiting

Method = Callable[[Tensor, Tensor, Tensor, longspan.SequenceLayout], Tensor]

HEADS, SIZE = 16, 128


def linear(topology: str, q: Tensor, k: Tensor, v: Tensor, layout: longspan.SequenceLayout) -> Tensor:
    o = longspan.linear_attention(q, k, v, layout=layout, exchange=topology)
    assert isinstance(o, Tensor)
    return o


def softmax(method: Any, q: Tensor, k: Tensor, v: Tensor, layout: longspan.SequenceLayout) -> Tensor:
    return longspan.softmax_attention(q, k, v, layout=layout, method=method)


class _ExchangeHeads(torch.autograd.Function):
    """All-to-all of n tensors: from T tokens of all heads to all tokens of H / P heads, or back.

    | | shape | |
    |---|---|---|
    | x | [n, T, H, D] | to tokens: [n, P · T, H / P, D] |
    | y | [n, P · T, H / P, D] | to tokens: [n, T, H, D] |

    Backward: the all-to-all the other way.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, to_heads: bool) -> Tensor:
        ctx.group, ctx.to_heads = group, to_heads
        return _exchange_heads(x, group, to_heads, "forward")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _exchange_heads(grads[0], ctx.group, not ctx.to_heads, "backward"), None, None


def _exchange_heads(x: Tensor, group: dist.ProcessGroup, to_heads: bool, phase: str) -> Tensor:
    num_ranks = dist.get_world_size(group)
    if to_heads:
        sent = torch.stack(x.chunk(num_ranks, dim=2))
    else:
        sent = torch.stack(x.chunk(num_ranks, dim=1))
    received = torch.empty_like(sent)
    note_collective("all_to_all", phase, sent.nbytes * (num_ranks - 1) // num_ranks, num_ranks - 1)
    with waiting():
        dist.all_to_all_single(received, sent, group=group)
    return torch.cat(tuple(received), dim=1 if to_heads else 2)


def linear_by_heads(q: Tensor, k: Tensor, v: Tensor, layout: longspan.SequenceLayout) -> Tensor:
    """DeepSpeed-Ulysses (arXiv 2309.14509) for linear attention: each rank computes H / P heads of the whole sequence.

    Ranks hold equal numbers of tokens, and P divides H.
    """
    assert layout.group is not None
    whole: Tensor = _ExchangeHeads.apply(torch.cat([q, k, v]), layout.group, True)
    o = longspan.linear_attention(*whole.split(1))
    assert isinstance(o, Tensor)
    back: Tensor = _ExchangeHeads.apply(o, layout.group, False)
    return back


class _Receive(torch.autograd.Function):
    """The state ``[1, H, K, V]`` that the rank before hands on, zeros on the first rank; backward hands its gradient back.

    anchor: any tensor that requires a gradient, and gets none.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, layout: longspan.SequenceLayout) -> Tensor:
        ctx.layout = layout
        state = torch.zeros(1, HEADS, SIZE, SIZE)
        if layout.rank > 0:
            with waiting():
                dist.recv(state, group=layout.group, group_src=layout.rank - 1)
        return state

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        if ctx.layout.rank > 0:
            _send(grads[0], ctx.layout, ctx.layout.rank - 1, "backward")
        return None, None


class _HandOn(torch.autograd.Function):
    """o as it is; the state is sent to the rank after, whose gradient backward waits for."""

    @staticmethod
    def forward(ctx: Any, o: Tensor, state: Tensor, layout: longspan.SequenceLayout) -> Tensor:
        ctx.layout, ctx.like = layout, state
        if layout.rank < layout.num_ranks - 1:
            _send(state, layout, layout.rank + 1, "forward")
        return o.view_as(o)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        layout, grad_state = ctx.layout, torch.zeros_like(ctx.like)
        if layout.rank < layout.num_ranks - 1:
            with waiting():
                dist.recv(grad_state, group=layout.group, group_src=layout.rank + 1)
        return grads[0], grad_state, None


def _send(state: Tensor, layout: longspan.SequenceLayout, target: int, phase: str) -> None:
    note_collective("send", phase, state.nbytes)
    dist.send(state.contiguous(), group=layout.group, group_dst=target)


def linear_receiving_first(q: Tensor, k: Tensor, v: Tensor, layout: longspan.SequenceLayout) -> Tensor:
    """LASP (arXiv 2404.02882) in the order of its published code: a rank computes once it has the state of the one before."""
    state: Tensor = _Receive.apply(q, layout)
    o, leaving = longspan.linear_attention(q, k, v, initial_state=state, output_final_state=True)
    handed_on: Tensor = _HandOn.apply(o, leaving, layout)
    return handed_on


LINEAR: dict[str, Method] = {
    "LASP-2 (all_gather)": partial(linear, "all_gather"),
    "LASP (ring)": partial(linear, "ring"),
    "LASP, receiving first": linear_receiving_first,
    "ZeCO (pipelined)": partial(linear, "pipelined"),
    "all_to_all": partial(linear, "all_to_all"),
    "head exchange (Ulysses)": linear_by_heads,
}
"""Linear attention."""
SOFTMAX: dict[str, Method] = {"Ring Attention (softmax)": partial(softmax, "ring")}
"""Softmax attention."""
METHODS = LINEAR | SOFTMAX


def make_tensors(layout: longspan.SequenceLayout, dtype: torch.dtype) -> list[Tensor]:
    """This rank's q, k of length 1, v, and a gradient of o."""
    generator = torch.Generator().manual_seed(layout.rank)
    shape = (1, layout.num_local_tokens, HEADS, SIZE)
    q, k, v, grad = (torch.randn(shape, generator=generator) for _ in range(4))
    return [*(x.to(dtype).requires_grad_() for x in (q, F.normalize(k, dim=-1), v)), grad.to(dtype)]


def step(method: Method, tensors: list[Tensor], layout: longspan.SequenceLayout) -> tuple[Tensor, ...]:
    """o and the gradients of q, k and v."""
    q, k, v, grad = tensors
    o = method(q, k, v, layout)
    return (o, *torch.autograd.grad(o, [q, k, v], grad))


def check(name: str, seq_len: int = 256) -> None:
    """Refuse to report a method whose output or gradient is wrong on a rank; to be called on every rank."""
    layout = longspan.SequenceLayout(seq_len)
    tensors = make_tensors(layout, torch.float32)
    got = step(METHODS[name], tensors, layout)
    whole = [layout.gather(x.detach()).double().requires_grad_(x.requires_grad) for x in tensors]
    expected = step(_softmax_alone if name in SOFTMAX else _linear_alone, whole, layout)
    for ours, right in zip(got, expected, strict=True):
        require_close(name, ours, layout.shard(right.detach()), 1e-4)


def _linear_alone(q: Tensor, k: Tensor, v: Tensor, layout: longspan.SequenceLayout) -> Tensor:
    scores = torch.einsum("bthd,bshd->bhts", q, k).tril() * SIZE**-0.5
    return torch.einsum("bhts,bshd->bthd", scores, v)


def _softmax_alone(q: Tensor, k: Tensor, v: Tensor, layout: longspan.SequenceLayout) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def times(names: list[str], seq_len: int, dtype: torch.dtype, repeats: int) -> dict[str, list[float]]:
    """Seconds of forward + backward of the slowest rank, in turn; to be called on every rank. One turn is not counted."""
    layout = longspan.SequenceLayout(seq_len)
    tensors = make_tensors(layout, dtype)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats + 1):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            elapsed = seconds_of_slowest(partial(step, METHODS[name], tensors, layout))
            if repeat:
                taken[name].append(elapsed)
    return taken


def times_by_length(
    lengths: list[int], dtype: torch.dtype, repeats: int, longest_step: float
) -> dict[int, dict[str, list[float]]]:
    """`times` for growing lengths; a method is left out once a longer step would take more than `longest_step` seconds."""
    for name in METHODS:
        check(name)
    taken: dict[int, dict[str, list[float]]] = {}
    names = list(METHODS)
    for seq_len in lengths:
        taken[seq_len] = times(names, seq_len, dtype, repeats)
        # Softmax attention takes four times as long at twice the length. The times are equal on all ranks, so is the choice.
        names = [name for name in names if 4 * statistics.median(taken[seq_len][name]) < longest_step]
        if not names:
            break
    return taken


def traffic(name: str, seq_len: int, dtype: torch.dtype) -> Traffic:
    """What this rank sends in one forward + backward."""
    layout = longspan.SequenceLayout(seq_len)
    tensors = make_tensors(layout, dtype)
    with record_traffic() as recorded:
        step(METHODS[name], tensors, layout)
    return recorded
