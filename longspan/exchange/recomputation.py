"""Activation checkpointing without a second forward exchange: what entered the first time is kept, and handed out again.

A checkpointed function runs forward, and once more when its gradients are asked for. What it exchanges is small, of a size that
does not grow with the length, so that keeping it costs less than sending it twice.

A first run is told from a repetition by the function itself. `keeping_states` makes a new one for every call of the checkpoint,
and with it a new list of what was exchanged; a repetition calls this same function. Exchanges are found in the list by their
order in the run, which is that of the program, on every rank: all ranks exchange, or none does. Nobody owns the list but the
function, which lives as long as the checkpoint may repeat it.

Where checkpoints nest, the outermost list is that of all. An inner call remembers its place in it: its exchanges are repeated
with the outer function, and once more with its own.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from longspan.checks import described
from longspan.comm.numbering import backward_of, steps_of
from longspan.errors import InputError
from longspan.exchange.topology import Arrived, Carrier, Exchanger, Handle, ReverseHandle
from longspan.layout import SequenceLayout, group_of
from longspan.state import Pair, Transition
from longspan.tracing import breaks_graphs

R = TypeVar("R")


def keeping_states(checkpoint: Callable[..., R]) -> Callable[..., R]:
    """`checkpoint`, whose recomputations exchange no memory states: the states that entered are kept from forward on.

    Args:
        checkpoint: `torch.utils.checkpoint.checkpoint`, reentrant or not, or what is called like it: with a function that it runs
            now and again in backward, and the function's arguments.

    Returns:
        A function with the arguments of `checkpoint`.

    From forward to backward a rank keeps, for each exchange, the states that enter its segments and the transitions that the
    reverse exchange needs. They are released with what the checkpoint itself has saved. Gradients are the same bits. The halo of
    a convolution, the keys of a softmax layer and `sum_over_ranks` are exchanged again, as without it. All ranks must use it
    alike, and every recomputation must make the exchanges of its forward, or its first ones.

    Where gradients are off, and while `torch.compile` traces, it is `checkpoint` as it is.

    Raises:
        InputError: for what cannot be called; in backward, where a recomputation exchanges other states than its forward.
    """
    _check_callable("checkpoint", checkpoint, "torch.utils.checkpoint.checkpoint")

    @wraps(checkpoint)
    def keeping(function: Callable[..., Any], *args: Any, **kwargs: Any) -> R:
        if breaks_graphs():
            return checkpoint(function, *args, **kwargs)
        _check_callable("a checkpoint's function", function, "a module or a function, and its arguments behind it")
        around = _RUN.get()
        if around is None and not torch.is_grad_enabled():
            return checkpoint(function, *args, **kwargs)
        return checkpoint(_repeatable(function, around), *args, **kwargs)

    return keeping


def carrier_of(exchange: Exchanger, pair: Pair, layout: SequenceLayout) -> Carrier:
    """Who carries an exchange out: `Exchanger.resolve`, or what was kept of it where a checkpointed function is repeated."""
    run = _RUN.get()
    return exchange.resolve(pair, layout) if run is None else run.carrier(exchange, pair, layout)


@dataclass
class _Kept:
    """An exchange of a checkpointed function. arrived: what it brought; None until it has been waited for."""

    carrier: Carrier
    kind: type[Transition]
    shape: torch.Size
    dtype: torch.dtype
    layout: SequenceLayout
    number: int = 0
    arrived: Arrived | None = None

    def check(self, pair: Pair, layout: SequenceLayout) -> None:
        """Raise InputError unless the pair, see `Carrier.start`, may be that of the same exchange."""
        state, kind = pair.state, type(pair.transition)
        same = (self.kind, self.shape, self.dtype) == (kind, state.shape, state.dtype)
        if not same or not _same_tokens(self.layout, layout):
            raise InputError(
                "the recomputation of a checkpointed function exchanges other states than its forward did: "
                f"{_described(kind, state.shape, state.dtype, layout)}, after "
                f"{_described(self.kind, self.shape, self.dtype, self.layout)}. The function must do the same each time: give "
                "it what it depends on as arguments"
            )


def _same_tokens(one: SequenceLayout, other: SequenceLayout) -> bool:
    if one is other:
        return True
    return (group_of(one), one.all_segments, one.document_bounds) == (
        group_of(other),
        other.all_segments,
        other.document_bounds,
    )


def _described(kind: type[Transition], shape: torch.Size, dtype: torch.dtype, layout: SequenceLayout) -> str:
    return (
        f"{tuple(shape)} of {kind.__name__} in {dtype} over {layout.seq_len} tokens in {layout.num_documents} documents"
    )


@dataclass
class _Run:
    """One run of a checkpointed function. kept: the exchanges of all runs. position: how many of them this one has come to."""

    kept: list[_Kept]
    position: int = 0

    def carrier(self, exchange: Exchanger, pair: Pair, layout: SequenceLayout) -> Carrier:
        """The next exchange's."""
        if self.position == len(self.kept):
            state = pair.state
            carrier = exchange.resolve(pair, layout)
            self.kept.append(_Kept(carrier, type(pair.transition), state.shape, state.dtype, layout))
        kept = self.kept[self.position]
        kept.check(pair, layout)
        self.position += 1
        return _Keeping(kept)


_RUN: ContextVar[_Run | None] = ContextVar("longspan_run", default=None)
"""The run of a checkpointed function that this thread is in; autograd repeats functions in threads of its own."""


def _repeatable(function: Callable[..., Any], around: _Run | None) -> Callable[..., Any]:
    """`function` for one call of a checkpoint, in the run `around` it, if any: its first run exchanges, and later ones repeat."""
    kept, start = ([], 0) if around is None else (around.kept, around.position)
    has_run = False

    def run_function(*args: Any, **kwargs: Any) -> Any:
        nonlocal has_run
        # The first run is a part of the run around it, which must come to the exchanges behind this call.
        run = around if around is not None and not has_run and _RUN.get() is around else _Run(kept, start)
        has_run = True
        token = _RUN.set(run)
        try:
            return function(*args, **kwargs)
        finally:
            _RUN.reset(token)

    return run_function


class _Keeping(Carrier):
    """An exchange that is carried out and kept, or was before. It holds nothing of that once it has been started."""

    def __init__(self, kept: _Kept) -> None:
        self._kept: _Kept | None = kept
        self._carrier, self._number = kept.carrier, kept.number

    def start(self, pair: Pair, layout: SequenceLayout) -> Handle:
        kept, self._kept = self._kept, None
        assert kept is not None
        if kept.arrived is not None:
            return _Again(kept.arrived)
        handle = self._carrier.start(pair, layout)
        self._number = kept.number = steps_of(group_of(layout)).number
        return _First(handle, kept)

    def start_reverse(
        self, kind: type[Transition], context: tuple[Tensor, ...], grad_incoming: Tensor, layout: SequenceLayout
    ) -> ReverseHandle:
        # A repetition has begun no exchange: the number is that of the one which it repeats, on every rank.
        with backward_of(self._number):
            return self._carrier.start_reverse(kind, context, grad_incoming, layout)


@dataclass
class _First(Handle):
    handle: Handle
    kept: _Kept

    def wait(self) -> Arrived:
        arrived = self.handle.wait()
        # What is returned becomes an output of a node, and so a tensor of that node's graph.
        self.kept.arrived = Arrived(arrived.incoming.detach(), arrived.context)
        return arrived


@dataclass
class _Again(Handle):
    arrived: Arrived

    def wait(self) -> Arrived:
        return Arrived(self.arrived.incoming.detach(), self.arrived.context)


def _check_callable(name: str, function: object, expected: str) -> None:
    if not callable(function):
        raise InputError(f"{name} must be something to call; got {described(function)}. Pass {expected}")
