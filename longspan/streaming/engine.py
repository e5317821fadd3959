"""Segments of time in order, and backward in reverse: the graph of one of them is there at a time.

With M_s what enters segment s, f the model, and λ_s = ∂L/∂M_s:

    forward, without a graph       M_{s+1} = f(M_s, tokens of s)                        for s = 0, 1, ...
    backward, from the last one    l_s, M_{s+1} = f(M_s, tokens of s)   with its graph;  (1, λ_{s+1}) -> λ_s and the parameters'

The last segment needs no first pass. What all later segments read, such as keys, gathers the gradients that they send, and their
sum enters backward in the segment that made it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from longspan.autocast import without_autocast
from longspan.checks import described
from longspan.errors import InputError
from longspan.models.segments import Between, SegmentDone
from longspan.streaming.adapters import Memory
from longspan.streaming.kept import KeptMemory, check_same_tensors
from longspan.streaming.random_states import RandomStates


class SequenceInSegments(Protocol):
    """A sequence and a model, by numbers of segments.

    num_segments: S. counts_first: as in `StreamedSequence`.
    """

    num_segments: int

    @property
    def counts_first(self) -> bool: ...

    def goes_on(self, segment: int) -> bool:
        """Whether a segment begins with what the one before it left."""
        ...

    def start(self) -> Any: ...

    def remember(self, segment: int, memory: Any) -> Any: ...

    def all_remembered(self) -> None: ...

    def loss(self, segment: int, memory: Any, keeps: bool) -> tuple[Tensor, Any]: ...


def forward_backward(
    sequence: SequenceInSegments,
    device: torch.device,
    *,
    keep_every: int,
    around_backward: Callable[[bool], AbstractContextManager[None]],
    between: Between,
) -> Tensor:
    """Add the gradients of the sequence's loss to those of the parameters; return the loss, a scalar without a graph.

    Args:
        device: whose random state the model draws from, beside the CPU's.
        keep_every: as in `KeptMemory`.
        around_backward: what each backward runs in, told whether it is the last one.
    """
    random = RandomStates(device)

    def remember(segment: int, memory: Any) -> Any:
        with torch.no_grad(), random.of(segment):
            return sequence.remember(segment, memory)

    def again(segment: int, memory: Any) -> Any:
        left = remember(segment, memory)
        between(SegmentDone("again", segment, sequence.num_segments))
        return left

    kept = KeptMemory(keep_every, sequence.goes_on, sequence.start, again)
    _forward(sequence, kept, remember, between)
    total, behind = torch.zeros((), dtype=torch.float64, device=device), None
    for segment in reversed(range(sequence.num_segments)):
        before = kept.entering(segment)
        loss = _backward(sequence, segment, before, behind, random, around_backward)
        total += loss.double()
        kept.drop(segment + 1)
        behind = before if sequence.goes_on(segment) else None
        between(SegmentDone("backward", segment, sequence.num_segments))
    random.leave()
    return total.to(loss.dtype)


def _forward(
    sequence: SequenceInSegments, kept: KeptMemory, remember: Callable[[int, Any], Any], between: Between
) -> None:
    """What enters each segment, in order; the same passes on every rank, whatever its documents."""
    memory = sequence.start()
    _check_constant(memory)
    last = sequence.num_segments - 1
    for segment in range(sequence.num_segments):
        kept.enter(segment, memory)
        if segment < last or sequence.counts_first:
            left = remember(segment, memory)
            memory = left if segment < last and sequence.goes_on(segment + 1) else sequence.start()
            between(SegmentDone("forward", segment, sequence.num_segments))
    if sequence.counts_first:
        sequence.all_remembered()


def _check_constant(memory: Memory) -> None:
    for name, x in memory.tensors.items():
        if x.requires_grad:
            raise InputError(
                f"stream(): {name}, with which a document begins, requires a gradient, and what enters a sequence gets none; got "
                f"{described(x)}. Let the adapter's start() give constants, and the model read its parameter by itself"
            )


def _backward(
    sequence: SequenceInSegments,
    segment: int,
    before: Memory,
    behind: Memory | None,
    random: RandomStates,
    around_backward: Callable[[bool], AbstractContextManager[None]],
) -> Tensor:
    """Compute a segment with its graph, and backward through it; return its share of the loss.

    before: what enters it, whose tensors then have gradients. behind: what entered the next one, with gradients, which are taken.
    """
    for x in before.tensors.values():
        if x.is_floating_point():
            x.requires_grad_()
    # Casts that were made without a graph have none.
    torch.clear_autocast_cache()
    with torch.enable_grad(), random.of(segment):
        loss, left = sequence.loss(segment, before, behind is not None)
    outputs, gradients = [loss], [torch.ones_like(loss)]
    if behind is not None:
        check_same_tensors(segment, left, behind)
        sent = [(x, taken_gradient(behind.tensors[name])) for name, x in left.tensors.items()]
        for x, gradient in (*sent, *left.sent_back(behind)):
            if x.requires_grad:
                outputs.append(x)
                gradients.append(gradient)
    del left
    # Where the caller runs both passes under autocast: no more is cast backward than forward has cast.
    with around_backward(segment == 0), without_autocast(loss):
        torch.autograd.backward(outputs, gradients)
    return loss.detach()


def taken_gradient(x: Tensor) -> Tensor:
    """The gradient that the next segment has sent to x, which keeps none; zeros where it has sent nothing."""
    found, x.grad = x.grad, None
    return torch.zeros_like(x) if found is None else found
