"""Activation checkpointing with states that are kept: gradients of the same bits, and no second forward exchange."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import longspan
from longspan import SequenceLayout, record_traffic
from longspan.comm.numbering import steps_of
from longspan.errors import InputError
from longspan.exchange import Arrived, Carrier, Exchanger, Handle, Ring, keeping_states
from longspan.layout import group_of
from tests.exchange.drain import drain
from tests.ranks import raised, run_on_ranks

keeping = keeping_states(checkpoint)
LENGTH = 37
DOCUMENTS = [0, 5, 21, 37]


@dataclass
class Checkpoint:
    """How a function is checkpointed: by what, reentrant or not."""

    by: Callable[..., Any]
    reentrant: bool

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        return self.by(function, *args, use_reentrant=self.reentrant)


def x_of(layout: SequenceLayout, seed: int = 0) -> Tensor:
    """``[1, T, 8]``, which takes a gradient."""
    whole = torch.randn(1, LENGTH, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return layout.shard(whole).requires_grad_()


def layer(layout: SequenceLayout, exchange: Any, x: Tensor) -> Tensor:
    """Three exchanges: of a transition that every rank knows, of decays of channels, and of matrices."""
    q, k, v, g = x.view(1, -1, 2, 4), x.view(1, -1, 2, 4).sin(), x.view(1, -1, 2, 4).cos(), -x.view(1, -1, 2, 4).exp()
    for operator, gates in (
        (longspan.retention, ([-0.1, -0.2],)),
        (longspan.gla, (g,)),
        (longspan.gated_delta_rule, (g.sum(-1), g.exp()[..., 0])),
    ):
        v = v + operator(q, k / 2, v, *gates, layout=layout, exchange=exchange)
    return v.reshape(x.shape)


def gradient(x: Tensor, y: Tensor) -> Tensor:
    """The gradient of a function of y; x has no other afterwards."""
    y.square().sum().backward()
    grad = x.grad
    assert grad is not None
    x.grad = None
    return grad


def grad_and_traffic(layout: SequenceLayout, x: Tensor, y: Tensor) -> tuple[Tensor, int, int]:
    drain(layout)
    with record_traffic() as traffic:
        grad = gradient(x, y)
        drain(layout)
    return grad, traffic.count("forward"), traffic.count("backward")


def forward_in_backward(layout: SequenceLayout, exchange: Any, by: Checkpoint | None) -> tuple[Tensor, int, int]:
    """The gradient, and how often ranks exchanged in backward: as forward does, and backward."""
    x = x_of(layout)
    y = layer(layout, exchange, x) if by is None else by(partial(layer, layout, exchange), x)
    return grad_and_traffic(layout, x, y)


def kept_by(exchange: str, order: Any, packed: bool) -> list[tuple[bool, ...]]:
    layout = SequenceLayout(LENGTH, order=order, documents=DOCUMENTS if packed else None)
    # Whatever is made once is made.
    want, _, backward = forward_in_backward(layout, exchange, None)
    found: list[tuple[bool, ...]] = []
    for reentrant in (True, False):
        plain, sent_again, _ = forward_in_backward(layout, exchange, Checkpoint(checkpoint, reentrant))
        kept, sent, sent_backward = forward_in_backward(layout, exchange, Checkpoint(keeping, reentrant))
        found.append(
            (torch.equal(kept, want), torch.equal(plain, want), sent == 0, sent_backward == backward, sent_again > 0)
        )
    return found


@pytest.mark.slow_rows(r"two_level-True|(pipelined|ring)-False", r"(two_level|all_to_all)-False")
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^(auto-False|all_gather-True)$")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("exchange", ["all_gather", "ring", "pipelined", "all_to_all", "two_level", "auto"])
def test_a_recomputation_exchanges_nothing_and_gradients_are_the_same_bits(exchange: str, packed: bool) -> None:
    order = "contiguous" if packed else "zigzag"
    for found in run_on_ranks(3, kept_by, exchange, order, packed):
        for *same, sent_again in found:
            assert all(same)
            # In a chain the last rank may have nothing to send.
            assert sent_again or exchange in ("ring", "pipelined", "auto")


def labels(reentrant: bool) -> tuple[int, list[str]]:
    layout = SequenceLayout(LENGTH)
    by = Checkpoint(keeping, reentrant)
    for exchange in ("all_gather", "ring"):
        x = x_of(layout)
        gradient(x, by(partial(layer, layout, exchange), x))
    steps = steps_of(group_of(layout))
    return steps.number, [label for _, label in list(steps.recent)[-12:]]


@pytest.mark.parametrize("reentrant", [True, False])
def test_ranks_stay_in_step_and_backward_names_the_exchange_of_forward(reentrant: bool) -> None:
    (number, names), *others = run_on_ranks(3, labels, reentrant)
    assert all(other == (number, names) for other in others)
    for start, exchange in ((number - 11, "all_gather"), (number - 5, "ring")):
        place = start - (number - 11)
        assert names[place : place + 3] == [f"forward {exchange}"] * 3
        assert names[place + 3 : place + 6] == [f"backward {exchange} of exchange {start + i}" for i in (2, 1, 0)]


def two_forwards(reentrant: bool) -> bool:
    layouts = [SequenceLayout(LENGTH), SequenceLayout(LENGTH, documents=DOCUMENTS)]
    by = Checkpoint(keeping, reentrant)

    def both(call: Callable[..., Tensor]) -> list[Tensor]:
        xs = [x_of(layout, seed) for seed, layout in enumerate(layouts)]
        first, second = (call(partial(layer, layout, "ring"), x) for layout, x in zip(layouts, xs, strict=True))
        # The first one's backward is last, and not from the same call.
        return [gradient(xs[1], second), gradient(xs[0], first)]

    want, got = both(lambda function, x: function(x)), both(by)
    return all(torch.equal(x, y) for x, y in zip(want, got, strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
def test_two_forwards_keep_apart_what_is_theirs(reentrant: bool) -> None:
    assert all(run_on_ranks(2, two_forwards, reentrant))


def nested(kinds: tuple[tuple[bool, bool], tuple[bool, bool]]) -> tuple[bool, int]:
    layout = SequenceLayout(LENGTH)
    outer, inner = (Checkpoint(keeping if keeps else checkpoint, reentrant) for keeps, reentrant in kinds)
    one = partial(layer, layout, "all_gather")

    def around(x: Tensor) -> Tensor:
        return one(inner(one, inner(one, one(x)))) + inner(one, x)

    x = x_of(layout)
    want = gradient(x, one(one(one(one(x)))) + one(x))
    y = outer(around, x)
    with record_traffic() as traffic:
        grad = gradient(x, y)
    return torch.equal(grad, want), traffic.count("forward")


# Inside a reentrant checkpoint, whose first run records nothing, PyTorch warns of another one.
in_reentrant = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
KEEPING = [(True, True), (True, False)]


@in_reentrant
@pytest.mark.parametrize("inner", KEEPING)
@pytest.mark.parametrize("outer", KEEPING)
def test_the_outermost_checkpoint_keeps_for_those_inside(outer: tuple[bool, bool], inner: tuple[bool, bool]) -> None:
    assert run_on_ranks(2, nested, (outer, inner)) == [(True, 0)] * 2


@in_reentrant
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_inside_or_around_that_keeps_nothing_exchanges_again(reentrant: bool) -> None:
    for kinds in (((True, reentrant), (False, reentrant)), ((False, reentrant), (True, reentrant))):
        first, second = run_on_ranks(2, nested, kinds)
        assert first == second and first[0] and first[1] > 0


@dataclass(frozen=True)
class Watched(Exchanger):
    """The ring; notes the memory of what arrives."""

    arrived: list[StorageWeakRef] = field(default_factory=list)

    def resolve(self, pair: Any, layout: SequenceLayout) -> Carrier:
        return _WatchedCarrier(Ring().resolve(pair, layout), self.arrived)

    def modelled(self, pair: Any, layout: SequenceLayout) -> Any:
        return Ring().modelled(pair, layout)

    @property
    def num_alive(self) -> int:
        return sum(not memory.expired() for memory in self.arrived)


@dataclass(frozen=True)
class _WatchedCarrier(Carrier):
    carrier: Carrier
    arrived: list[StorageWeakRef]

    def start(self, pair: Any, layout: SequenceLayout) -> Handle:
        return _WatchedHandle(self.carrier.start(pair, layout), self.arrived)

    def start_reverse(self, *args: Any) -> Any:
        return self.carrier.start_reverse(*args)


@dataclass
class _WatchedHandle(Handle):
    handle: Handle
    arrived: list[StorageWeakRef]

    def wait(self) -> Arrived:
        arrived = self.handle.wait()
        self.arrived.append(StorageWeakRef(arrived.incoming.untyped_storage()))
        return arrived


def alive(reentrant: bool) -> list[int]:
    """How many incoming states are alive: before backward, after it, after the graph; without backward; without a graph."""
    layout, exchange, by = SequenceLayout(LENGTH), Watched(), Checkpoint(keeping, reentrant)
    counts: list[int] = []

    def function(x: Tensor) -> Tensor:
        q = x.view(1, -1, 2, 4)
        for _ in range(3):
            q = q + longspan.gla(q, q.sin(), q.cos(), -q.exp(), layout=layout, exchange=exchange)
        return q

    def count() -> None:
        drain(layout)
        counts.append(exchange.num_alive)

    gc.disable()
    try:
        loss = by(function, x_of(layout)).sum()
        count()
        loss.backward()
        count()
        del loss
        count()
        by(function, x_of(layout))
        count()
        with torch.no_grad():
            by(function, x_of(layout))
        count()
    finally:
        gc.enable()
    assert len(exchange.arrived) == 9
    return counts


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_is_kept_is_released_with_the_graph(reentrant: bool) -> None:
    # What a reentrant checkpoint calls again is its node's, and lives as long as that.
    assert run_on_ranks(2, alive, reentrant) == [[3, 3 if reentrant else 0, 0, 0, 0]] * 2


def twice(reentrant: bool) -> tuple[bool, int]:
    layout = SequenceLayout(LENGTH)
    x = x_of(layout)
    loss = Checkpoint(keeping, reentrant)(partial(layer, layout, "all_gather"), x).square().sum()
    loss.backward(retain_graph=True)
    first, x.grad = x.grad, None
    with record_traffic() as traffic:
        loss.backward()
    assert first is not None and x.grad is not None
    return torch.equal(first, x.grad), traffic.count("forward")


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_second_backward_exchanges_nothing_either(reentrant: bool) -> None:
    assert run_on_ranks(2, twice, reentrant) == [(True, 0)] * 2


def read_outside() -> tuple[bool, int]:
    """A memory that is written inside and read outside: the exchange arrives behind the first run."""
    layout = SequenceLayout(LENGTH)

    def write(x: Tensor) -> Any:
        k = x.view(1, -1, 2, 4)
        return longspan.write("gla", k.sin(), k.cos(), g=-k.exp(), layout=layout, exchange="all_gather")

    x = x_of(layout)
    want = gradient(x, write(x).read(x.view(1, -1, 2, 4)))
    y = keeping(write, x, use_reentrant=False).read(x.view(1, -1, 2, 4))
    with record_traffic() as traffic:
        grad = gradient(x, y)
    return torch.equal(grad, want), traffic.count("forward")


def test_an_exchange_that_arrives_behind_the_first_run_is_kept() -> None:
    assert run_on_ranks(2, read_outside) == [(True, 0)] * 2


def selective(saves: bool) -> tuple[bool, int]:
    layout = SequenceLayout(LENGTH)
    x = x_of(layout)
    want = gradient(x, layer(layout, "all_gather", x))
    policy = CheckpointPolicy.MUST_SAVE if saves else CheckpointPolicy.PREFER_RECOMPUTE
    contexts = partial(create_selective_checkpoint_contexts, lambda ctx, op, *args, **kwargs: policy)
    y = keeping(partial(layer, layout, "all_gather"), x, use_reentrant=False, context_fn=contexts)
    with record_traffic() as traffic:
        grad = gradient(x, y)
    return torch.equal(grad, want), traffic.count("forward")


@pytest.mark.parametrize("saves", [True, False])
def test_policies_of_selective_checkpointing_change_nothing(saves: bool) -> None:
    assert run_on_ranks(2, selective, saves) == [(True, 0)] * 2


def changed(reentrant: bool) -> list[str]:
    layout, other = SequenceLayout(LENGTH), SequenceLayout(LENGTH, documents=DOCUMENTS)

    def of_head_sizes(layouts: list[SequenceLayout], sizes: list[int]) -> str:
        def function(x: Tensor) -> Tensor:
            k = x.view(1, x.shape[1], -1, sizes.pop(0))
            return longspan.linear_attention(k, k, k, layout=layouts.pop(0), exchange="all_gather")

        y = keeping(function, x_of(layout), use_reentrant=reentrant)
        return str(raised(y.sum().backward))

    return [of_head_sizes([layout] * 2, [4, 2]), of_head_sizes([layout, other], [4, 4])]


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputation_of_other_states_is_refused_on_every_rank(reentrant: bool) -> None:
    for sizes, documents in run_on_ranks(2, changed, reentrant):
        assert "(1, 1, 4, 2, 2) of Identity in torch.float64" in sizes and "after (1, 1, 2, 4, 4)" in sizes
        assert "in 3 documents, after" in documents


def test_what_cannot_be_called_is_refused() -> None:
    with pytest.raises(InputError, match="checkpoint must be something to call; got 3"):
        keeping_states(3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="a checkpoint's function must be something to call; got a Tensor"):
        keeping(torch.zeros(2), use_reentrant=False)
