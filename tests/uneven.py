"""Run what other tests run on ranks, with layouts whose ranks hold uneven shares."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

from longspan.layout import SequenceLayout


@contextmanager
def uneven_layouts(weights: Sequence[float]) -> Iterator[None]:
    """Every layout that is built over as many ranks as there are weights, and told of none, has these."""
    original = SequenceLayout._init

    def init(layout: SequenceLayout, *arguments: Any) -> None:
        *others, given = arguments
        num_ranks = arguments[2]
        call: Any = original
        call(layout, *others, weights if given is None and num_ranks == len(weights) else given)

    with mock.patch.object(SequenceLayout, "_init", init):
        yield


def with_weights(weights: Sequence[float], function: Callable[..., Any], *arguments: Any) -> Any:
    """``function(*arguments)`` on a rank, where layouts have these weights."""
    with uneven_layouts(weights):
        return function(*arguments)
