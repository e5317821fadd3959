"""How long a layer waits for the exchange of its states, with the layer's computation around it.

A layer has three stretches of computation: *before* the exchange is started (keys, values, gates, write), *between* start and wait
(query and output gate), and *after* (read, output). Backward runs them in reverse, with the exchange of gradients around *between*.

Two ways to measure. With real computation, on no more ranks than there are cores. Or *paced*, on any number: each stretch is
replaced by sleeping for the time that it takes one process alone, as if every rank had a core of its own; the exchange is real.

Shapes: B1, T tokens of a rank, `HEADS` heads, K = V = `SIZE`, width `WIDTH`; float32, which every CPU computes fast.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import record_function

import longspan
from longspan.attention.linear import LinearMemory
from longspan.exchange import TOPOLOGIES, exchange_named, record_traffic, start_exchange
from longspan.exchange.auto.figures import figures_of
from longspan.ops.variants import VARIANTS
from longspan.plan import Problem
from longspan.state import Pair, ScalarDecay

OPERATOR = "simple_gla"
HEADS, SIZE, WIDTH = 16, 128, 512


class Layer:
    """A gated linear-attention layer of one rank: weights and an input."""

    def __init__(self, num_tokens: int) -> None:
        generator = torch.Generator().manual_seed(0)

        def weight(rows: int, columns: int) -> Tensor:
            return (torch.randn(rows, columns, generator=generator) * rows**-0.5).requires_grad_()

        inner = HEADS * SIZE
        self.q, self.k, self.v, self.gate = (weight(WIDTH, inner) for _ in range(4))
        self.decay, self.out = weight(WIDTH, HEADS), weight(inner, WIDTH)
        self.x = torch.randn(1, num_tokens, WIDTH, generator=generator).requires_grad_()
        self.grad = torch.randn(1, num_tokens, WIDTH, generator=generator)

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x, self.q, self.k, self.v, self.gate, self.decay, self.out]

    def written(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys of length 1, values, log decays."""
        k = F.normalize(_heads(self.x @ self.k), dim=-1)
        return k, _heads(self.x @ self.v), F.logsigmoid(self.x @ self.decay) / 16

    def asked(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What needs no other rank: queries, output gate."""
        return _heads(x @ self.q), F.silu(x @ self.gate)

    def output(self, o: Tensor, gate: Tensor) -> Tensor:
        return (o.flatten(2) * gate) @ self.out

    def forward(self, layout: longspan.SequenceLayout, exchange: str, blocking: bool = False) -> Tensor:
        """The layer's output; blocking: wait for the exchange as soon as it has been started."""
        with record_function("before"):
            k, v, g = self.written()
            memory = longspan.write(OPERATOR, k, v, g=g, layout=layout, exchange=exchange)
        if blocking:
            assert isinstance(memory, LinearMemory)
            memory.incoming()
        with record_function("between"):
            q, gate = self.asked(self.x)
        with record_function("after"):
            return self.output(memory.read(q), gate)


def _heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, SIZE))


@dataclass(frozen=True)
class Stretches:
    """Seconds of a layer's computation, forward and backward, on one process alone."""

    before: float
    between: float
    after: float
    before_backward: float
    between_backward: float
    after_backward: float

    @property
    def forward(self) -> float:
        return self.before + self.between + self.after

    @property
    def backward(self) -> float:
        return self.before_backward + self.between_backward + self.after_backward


class _Mark(torch.autograd.Function):
    """The identity; calls a function when its gradient passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mark: Callable[[], None]) -> Tensor:
        ctx.mark = mark
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.mark()
        return grads[0], None


def stretches(num_tokens: int, repeats: int) -> Stretches:
    """The medians over `repeats` layers of `num_tokens`, after one that is not counted. Without a process group."""
    torch.set_num_threads(1)
    layer = Layer(num_tokens)
    taken = [_stretches_once(layer) for _ in range(repeats + 1)][1:]
    return Stretches(*(statistics.median(getattr(one, name.name) for one in taken) for name in fields(Stretches)))


def _stretches_once(layer: Layer) -> Stretches:
    marks = [time.perf_counter()]

    def mark() -> None:
        marks.append(time.perf_counter())

    k, v, g = layer.written()
    memory = longspan.write(OPERATOR, k, v, g=g)
    mark()
    # Nodes run backward in the reverse order of their creation: the first to be marked is the end of read, then that of the rest.
    q, gate = layer.asked(_Mark.apply(layer.x, mark))
    marked = _Mark.apply(q, mark)
    mark()
    y = layer.output(memory.read(marked), gate)
    mark()
    torch.autograd.grad(y, layer.leaves, layer.grad)
    mark()
    before, between, after, after_backward, between_backward, before_backward = (
        later - earlier for earlier, later in pairwise(marks)
    )
    return Stretches(before, between, after, before_backward, between_backward, after_backward)


@dataclass(frozen=True)
class Exposed:
    """Seconds of a layer and how much of them the exchange takes, each of the rank that takes longest; medians.

    modelled_forward, modelled_backward: by the cost model with links as they were measured on these ranks; None without.
    """

    forward: float
    backward: float
    exposed_forward: float
    exposed_backward: float
    modelled_forward: float | None = None
    modelled_backward: float | None = None

    @property
    def share(self) -> float:
        """Of the layer's time."""
        return (self.exposed_forward + self.exposed_backward) / (self.forward + self.backward)


Side = tuple[str, bool]
"""A topology, and whether the layer waits as soon as it has started."""


def real(num_tokens: int, sides: list[Side], repeats: int) -> dict[Side, Exposed]:
    """Layers with real computation; to be called on every rank. Exposed is the time in which a rank waits for others."""
    layout = longspan.SequenceLayout(num_tokens * dist.get_world_size())
    layer = Layer(num_tokens)

    def run(side: Side) -> list[float]:
        with record_traffic() as traffic:
            begun = time.perf_counter()
            y = layer.forward(layout, *side)
            forward, waited = time.perf_counter() - begun, traffic.wait_seconds
            dist.barrier()
            begun = time.perf_counter()
            torch.autograd.grad(y, layer.leaves, layer.grad)
        return [forward, time.perf_counter() - begun, waited, traffic.wait_seconds - waited]

    return {side: Exposed(*values) for side, values in _in_turn(sides, run, repeats).items()}


def paced(taken: Stretches, sides: list[Side], repeats: int) -> dict[Side, Exposed]:
    """Layers whose computation is replaced by its time; to be called on every rank. Exposed is what their time exceeds it by."""
    layout = longspan.SequenceLayout(4 * dist.get_world_size())
    shape = (layout.num_segments, 1, HEADS, SIZE, SIZE)
    transition = VARIANTS[OPERATOR].transition
    assert transition is ScalarDecay
    x = torch.zeros((), requires_grad=True)
    state = torch.randn(shape).requires_grad_()
    parameter = (-torch.rand(ScalarDecay.parameter_shape(shape))).requires_grad_()
    grad = torch.randn(shape)
    problem = Problem.of_states(transition, shape, layout)
    cluster = figures_of(layout, state.device).cluster

    def run(side: Side, taken: Stretches = taken) -> list[float]:
        name, blocking = side
        exchange = exchange_named(name)
        begun = time.perf_counter()
        written = _Pace.apply(state, taken.before, taken.before_backward)
        pending = start_exchange(exchange, Pair(ScalarDecay(parameter), written), layout)
        incoming = pending.wait() if blocking else None
        asked = _Pace.apply(x, taken.between, taken.between_backward)
        arrived = pending.wait() if incoming is None else incoming
        out = _Pace.apply(arrived + asked, taken.after, taken.after_backward)
        forward = time.perf_counter() - begun
        dist.barrier()
        begun = time.perf_counter()
        torch.autograd.grad(out, [x, state, parameter], grad)
        backward = time.perf_counter() - begun
        return [forward, backward, forward - taken.forward, backward - taken.backward]

    results = {}
    in_no_time = Stretches(*[0.0] * 6)
    for side, values in _in_turn(sides, run, repeats, lambda side: run(side, in_no_time)).items():
        name, blocking = side
        modelled: list[float | None] = [None, None]
        if name != "auto":
            cost = TOPOLOGIES[name]().cost(problem, cluster)
            hides = [0.0, 0.0] if blocking else [taken.between, taken.between_backward]
            modelled = [
                phase.exposed(hidden) for phase, hidden in zip((cost.forward, cost.backward), hides, strict=True)
            ]
        results[side] = Exposed(*values, *modelled)
    return results


class _Pace(torch.autograd.Function):
    """The identity, which takes a given time each way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float, seconds_backward: float) -> Tensor:
        ctx.seconds_backward = seconds_backward
        time.sleep(seconds)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        time.sleep(ctx.seconds_backward)
        return grads[0], None, None


def _in_turn(
    sides: list[Side],
    run: Callable[[Side], list[float]],
    repeats: int,
    warm_up: Callable[[Side], object] | None = None,
) -> dict[Side, list[float]]:
    """For each side the medians of its values, each value that of the rank where it is largest.

    warm_up: what is done once with each side, not counted, before; None is `run`.
    """
    values: dict[Side, list[list[float]]] = {side: [] for side in sides}
    for side in sides:
        dist.barrier()
        (warm_up or run)(side)
    for repeat in range(repeats):
        first = repeat % len(sides)
        for side in sides[first:] + sides[:first]:
            dist.barrier()
            largest = torch.tensor(run(side), dtype=torch.float64)
            dist.all_reduce(largest, dist.ReduceOp.MAX)
            values[side].append(largest.tolist())
    return {side: [statistics.median(column) for column in zip(*rows, strict=True)] for side, rows in values.items()}
