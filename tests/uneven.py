"""Run what other tests run on ranks, with layouts whose ranks hold uneven shares."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

from longspan.layout import SequenceLayout


@contextmanager
def uneven_layouts(weights: Sequence[float], rank_order: Sequence[int] | None = None) -> Iterator[None]:
    """Every layout that is built over as many ranks as there are weights, and told of none, has these; so for the order."""
    original = SequenceLayout._init

    def init(layout: SequenceLayout, *arguments: Any) -> None:
        *others, given_weights, continues, given_order = arguments
        num_ranks = arguments[2]
        call: Any = original
        if given_weights is None and num_ranks == len(weights):
            given_weights = weights
        if given_order is None and rank_order is not None and num_ranks == len(rank_order):
            given_order = rank_order
        call(layout, *others, given_weights, continues, given_order)

    with mock.patch.object(SequenceLayout, "_init", init):
        yield


def with_order(rank_order: Sequence[int], function: Callable[..., Any], *arguments: Any) -> Any:
    """``function(*arguments)`` on a rank, where ranks hold the sequence in this order."""
    with uneven_layouts((), rank_order):
        return function(*arguments)


def with_weights(weights: Sequence[float], function: Callable[..., Any], *arguments: Any) -> Any:
    """``function(*arguments)`` on a rank, where layouts have these weights."""
    with uneven_layouts(weights):
        return function(*arguments)
