"""Checkpoints that keep all exchanges: gradients of the same bits, no collective in a recomputation, softmax layers attend once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import longspan
from longspan import SequenceLayout, record_traffic
from longspan.attention.softmax import write_softmax
from longspan.exchange import keeping_exchanges, keeping_states
from tests.exchange.drain import drain
from tests.ranks import raised, run_on_ranks

keeping = keeping_exchanges(checkpoint)
LENGTH = 37
DOCUMENTS = [0, 5, 21, 37]
SHAPES = (1, -1, 4, 4)


def x_of(layout: SequenceLayout) -> Tensor:
    whole = torch.randn(1, LENGTH, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return layout.shard(whole).requires_grad_()


def layer(layout: SequenceLayout, method: Any, options: dict[str, Any], x: Tensor) -> Tensor:
    """A convolution, a shift, linear attention, and a softmax layer that is read twice."""
    taps = torch.linspace(-1.0, 1.0, 64, dtype=torch.float64).view(16, 4)
    y = longspan.causal_conv1d(x, taps, layout=layout) + longspan.token_shift(x, layout=layout)
    q, k, v = y.view(SHAPES), y.view(SHAPES).sin(), y.view(SHAPES).cos()
    v = v + longspan.gla(q, k, v, -k.exp(), layout=layout, exchange="all_gather")
    memory = write_softmax(k[:, :, :2], v[:, :, :2], layout=layout, method=method, num_heads=4, **options)
    return (memory.read(q) + memory.read(q.sin())).reshape(x.shape)


def grad_and_traffic(function: Callable[[Tensor], Tensor], layout: SequenceLayout) -> tuple[Tensor, int, int, int]:
    """The gradient; exchanges of forward and of backward while it is made; how many blocks of softmax attention that computes."""
    x = x_of(layout)
    y = function(x)
    drain(layout)
    from longspan.ops.softmax import merge

    with (
        record_traffic() as traffic,
        mock.patch.object(merge, "block_forward", wraps=merge.block_forward) as attends,
    ):
        y.square().sum().backward()
        drain(layout)
    assert x.grad is not None
    return x.grad, traffic.count("forward"), traffic.count("backward"), attends.call_count


def compared(method: str, order: Any, packed: bool, options: dict[str, Any]) -> list[tuple[Any, ...]]:
    layout = SequenceLayout(LENGTH, order=order, documents=DOCUMENTS if packed else None)
    one = partial(layer, layout, method, options)
    # Whatever is made once is made.
    want, none, backward, attended = grad_and_traffic(one, layout)
    found: list[tuple[Any, ...]] = [(none, attended)]
    for reentrant in (True, False):
        for by in (checkpoint, keeping_states(checkpoint), keeping):
            checkpointed: Any = partial(by, one, use_reentrant=reentrant)
            got, *counts = grad_and_traffic(checkpointed, layout)
            found.append((torch.equal(got, want), counts[0], counts[1] - backward, counts[2]))
    return found


METHODS = ("all_gather", "ring", "ulysses")


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^contiguous-True-(ulysses|all_gather)$", r"^zigzag-False-ring$")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("order", "packed"), [("zigzag", False), ("contiguous", True)])
def test_a_recomputation_runs_no_collective_and_attends_no_second_time(method: str, order: str, packed: bool) -> None:
    for first, *others in run_on_ranks(2, compared, method, order, packed, {}):
        assert first == (0, 0)
        for plain, states, everything in (others[:3], others[3:]):
            assert plain[0] and states[0]
            assert plain[1] > states[1] > 0 and states[3] > 0
            assert everything == (True, 0, 0, 0)


def test_a_window_that_sees_no_other_rank_is_computed_again() -> None:
    # Nothing is exchanged by the softmax layer then, and so nothing of it is kept.
    for first, *others in run_on_ranks(2, compared, "all_gather", "contiguous", False, {"window": 1}):
        assert first == (0, 0)
        assert all(other[0] for other in others) and others[2][1:3] == (0, 0) and others[2][3] > 0


def other_keys() -> str:
    layout = SequenceLayout(LENGTH)
    heads = [2, 1]

    def function(x: Tensor) -> Tensor:
        k = x.view(SHAPES)[:, :, : heads.pop(0)]
        return longspan.softmax_attention(x.view(SHAPES), k, k, layout=layout, method="all_gather").reshape(x.shape)

    y = keeping(function, x_of(layout), use_reentrant=False)
    return str(raised(y.sum().backward))


def test_a_recomputation_with_other_keys_is_refused_on_every_rank() -> None:
    for text in run_on_ranks(2, other_keys):
        assert "InputError" in text and "exchanges other states than its forward did" in text
