"""all_gather: who needs nothing from other ranks does not wait for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longspan.exchange.topologies.all_gather import _ForwardGather, _ReverseGather
from longspan.layout import SequenceLayout
from longspan.state import HeadDecay, Pair, ScalarDecay, Transition

NUM_RANKS = 4


class NeverThere:
    """A collective that another rank has not joined."""

    def wait(self) -> None:
        raise TimeoutError


def forward_of(rank: int, order: Any, kind: type[Transition]) -> torch.Tensor:
    layout = SequenceLayout.for_rank(64, NUM_RANKS, rank, order)
    shape = (layout.num_segments, 1, 2, 3, 3)
    known = (len(layout.all_segments), *shape[1:])
    parameter = -torch.rand(kind.parameter_shape(known if kind.is_known else shape))
    pair = Pair(kind(parameter), torch.randn(shape))
    return _ForwardGather(torch.empty(0), NeverThere(), pair, layout).wait().incoming


def reverse_of(rank: int, order: Any) -> torch.Tensor:
    layout = SequenceLayout.for_rank(64, NUM_RANKS, rank, order)
    grad = torch.randn(layout.num_segments, 1, 2, 3, 3)
    transition = ScalarDecay(-torch.rand(len(layout.all_segments), 1, 2))
    return _ReverseGather(torch.empty(0), NeverThere(), transition, layout, grad).wait()


def test_the_first_rank_does_not_wait_forward_and_the_last_one_not_backward() -> None:
    assert not forward_of(0, "contiguous", HeadDecay).any()
    assert not reverse_of(NUM_RANKS - 1, "contiguous").any()


@pytest.mark.parametrize(
    ("rank", "order", "kind"),
    # The last: backward needs everyone's transitions, which come with their states.
    [(1, "contiguous", HeadDecay), (0, "zigzag", HeadDecay), (0, "contiguous", ScalarDecay)],
)
def test_who_needs_a_state_or_transitions_waits_forward(rank: int, order: str, kind: type[Transition]) -> None:
    with pytest.raises(TimeoutError):
        forward_of(rank, order, kind)


@pytest.mark.parametrize(("rank", "order"), [(0, "contiguous"), (NUM_RANKS - 1, "zigzag"), (0, "zigzag")])
def test_who_needs_a_gradient_waits_backward(rank: int, order: str) -> None:
    with pytest.raises(TimeoutError):
        reverse_of(rank, order)
