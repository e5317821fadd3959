"""Activation checkpointing without a second forward exchange: what entered the first time is kept, and handed out again.

A checkpointed function runs forward, and once more when its gradients are asked for. The states that it exchanges are small, of a
size that does not grow with the length, so that keeping them costs less than sending them twice: `keeping_states`. What a softmax
layer exchanges grows with the length; `keeping_exchanges` keeps that as well, and with it the layer's outputs, so that it attends
once.

A first run is told from a repetition by the function itself. `keeping_states` makes a new one for every call of the checkpoint,
and with it a new list of what was exchanged; a repetition calls this same function. Exchanges are found in the list by their
order in the run, which is that of the program, on every rank: all ranks exchange, or none does. Nobody owns the list but the
function, which lives as long as the checkpoint may repeat it.

Where checkpoints nest, the outermost list is that of all. An inner call remembers its place in it: its exchanges are repeated
with the outer function, and once more with its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from longspan.checks import described
from longspan.comm.numbering import backward_of, steps_of
from longspan.errors import InputError
from longspan.exchange.topology import Arrived, Carrier, Exchanger, Handle, ReverseHandle
from longspan.layout import SequenceLayout, group_of
from longspan.state import Form, Pair, Transition
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
    return _keeping(checkpoint, everything=False)


def keeping_exchanges(checkpoint: Callable[..., R]) -> Callable[..., R]:
    """`checkpoint`, whose recomputations run no collective of a layer: `keeping_states`, and what softmax layers and halos brought.

    As in `keeping_states`. Beside the states a rank keeps, for each softmax layer whose ranks exchange anything, its outputs and
    their log-sum-exp, and the keys and values that it was sent (``"all_gather"``), its heads' queries, keys and values of the whole
    sequence (``"ulysses"``), or nothing more (``"ring"``); a recomputation attends no second time. For each convolution it keeps
    the tokens before its segments. `sum_over_ranks` and final states are exchanged again.
    """
    return _keeping(checkpoint, everything=True)


def _keeping(checkpoint: Callable[..., R], everything: bool) -> Callable[..., R]:
    _check_callable("checkpoint", checkpoint, "torch.utils.checkpoint.checkpoint")

    @wraps(checkpoint)
    def keeping(function: Callable[..., Any], *args: Any, **kwargs: Any) -> R:
        if breaks_graphs():
            return checkpoint(function, *args, **kwargs)
        _check_callable("a checkpoint's function", function, "a module or a function, and its arguments behind it")
        around = _RUN.get()
        if around is None and not torch.is_grad_enabled():
            return checkpoint(function, *args, **kwargs)
        return checkpoint(_repeatable(function, around, everything), *args, **kwargs)

    return keeping


def carrier_of(exchange: Exchanger, pair: Pair, layout: SequenceLayout) -> Carrier:
    """Who carries an exchange out: `Exchanger.resolve`, or what was kept of it where a checkpointed function is repeated."""
    run = _RUN.get()
    return exchange.resolve(pair, layout) if run is None else run.carrier(exchange, pair, layout)


@dataclass
class KeptTensors:
    """What an exchange that is none of states brought in the first run of a checkpointed function, by the caller's own keys.

    signature: what repetitions must have in common with the first run.
    """

    signature: tuple[object, ...]
    tensors: dict[object, tuple[Tensor | None, ...]] = field(default_factory=dict)

    def keep(self, key: object, tensors: Iterable[Tensor | None]) -> None:
        """Keep what a step of the exchange brought."""
        # What is returned becomes an output of a node, and so a tensor of that node's graph.
        self.tensors[key] = tuple(None if x is None else x.detach() for x in tensors)

    def again(self, key: object) -> tuple[Any, ...] | None:
        """What the step brought in the first run; None in that run."""
        kept = self.tensors.get(key)
        return None if kept is None else tuple(None if x is None else x.detach() for x in kept)


def kept_tensors(*signature: object) -> tuple[KeptTensors | None, bool]:
    """Where the next exchange keeps what it brings, None where nothing is kept; and whether this run repeats it.

    signature: names and shapes; of a repetition they must be the same.
    """
    run = _RUN.get()
    return (None, False) if run is None or not run.everything else run.tensors(signature)


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
            raise _other_exchange(
                _described(kind, state.shape, state.dtype, layout),
                _described(self.kind, self.shape, self.dtype, self.layout),
            )


def _other_exchange(now: object, before: object) -> InputError:
    return InputError(
        f"the recomputation of a checkpointed function exchanges other states than its forward did: {now}, after {before}. The "
        "function must do the same each time: give it what it depends on as arguments"
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
    """One run of a checkpointed function. kept: the exchanges of all runs. position: how many of them this one has come to.

    everything: whether more is kept than states.
    """

    kept: list[_Kept | KeptTensors]
    position: int = 0
    everything: bool = False

    def carrier(self, exchange: Exchanger, pair: Pair, layout: SequenceLayout) -> Carrier:
        """The next exchange's."""
        state, kind = pair.state, type(pair.transition)
        if self.position == len(self.kept):
            carrier = exchange.resolve(pair, layout)
            self.kept.append(_Kept(carrier, kind, state.shape, state.dtype, layout))
        kept = self.kept[self.position]
        if isinstance(kept, KeptTensors):
            raise _other_exchange(_described(kind, state.shape, state.dtype, layout), kept.signature)
        kept.check(pair, layout)
        self.position += 1
        return _Keeping(kept)

    def tensors(self, signature: tuple[object, ...]) -> tuple[KeptTensors, bool]:
        """The next exchange's, and whether it is a repetition."""
        repeats = self.position < len(self.kept)
        if not repeats:
            self.kept.append(KeptTensors(signature))
        kept = self.kept[self.position]
        if not isinstance(kept, KeptTensors) or kept.signature != signature:
            raise _other_exchange(signature, kept.signature if isinstance(kept, KeptTensors) else "states")
        self.position += 1
        return kept, repeats


_RUN: ContextVar[_Run | None] = ContextVar("longspan_run", default=None)
"""The run of a checkpointed function that this thread is in; autograd repeats functions in threads of its own."""


def _repeatable(function: Callable[..., Any], around: _Run | None, everything: bool) -> Callable[..., Any]:
    """`function` for one call of a checkpoint, in the run `around` it, if any: its first run exchanges, and later ones repeat."""
    kept, start = ([], 0) if around is None else (around.kept, around.position)
    # The outermost list is that of all, and so is what it has.
    everything = everything if around is None else around.everything
    has_run = False

    def run_function(*args: Any, **kwargs: Any) -> Any:
        nonlocal has_run
        # The first run is a part of the run around it, which must come to the exchanges behind this call.
        run = around if around is not None and not has_run and _RUN.get() is around else _Run(kept, start, everything)
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
        self, kind: Form, context: tuple[Tensor, ...], grad_incoming: Tensor, layout: SequenceLayout
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
