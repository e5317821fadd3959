"""Models of Transformers whose ranks hold sequences in another order: the same loss, logits and gradients."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

import longspan
from longspan.errors import LayoutError
from longspan.integrations.transformers import pretrained as models
from longspan.layout import SequenceLayout
from tests.integrations.transformers.families import build
from tests.integrations.transformers.test_families import check
from tests.ranks import raised, run_on_ranks


@pytest.mark.parametrize("name", ["llama", pytest.param("bamba", marks=pytest.mark.slow)])
def test_ranks_in_another_order_are_one_process(name: str) -> None:
    check(name, "packed", 3, "zigzag", rank_order=[2, 0, 1])


def orders(rank_order: Any) -> list[tuple[int, ...]]:
    """Of the layouts that a model has made."""
    seen: list[tuple[int, ...]] = []
    original = SequenceLayout._init

    def init(layout: SequenceLayout, *arguments: Any) -> None:
        call: Any = original
        call(layout, *arguments)
        seen.append(layout.rank_order)

    def measured(layout: SequenceLayout, device: Any) -> tuple[int, ...]:
        assert layout.num_ranks == dist.get_world_size() and device.type == "cpu"
        return (1, 0)

    with mock.patch.object(models, "measured_rank_order", measured):
        model: Any = longspan.parallelize(build("llama"), None, rank_order=rank_order)
        with mock.patch.object(SequenceLayout, "_init", init):
            model(input_ids=model.get_input_embeddings().weight.new_zeros(1, 12).long())
    return seen


def test_the_order_may_be_that_of_measured_links() -> None:
    for seen in run_on_ranks(2, orders, "measured"):
        assert seen and set(seen) == {(1, 0)}


def in_order(rank_order: Any) -> None:
    longspan.parallelize(build("llama"), None, rank_order=rank_order)


def test_what_is_no_order_of_the_ranks_is_refused_on_all_of_them() -> None:
    for wrong in ([0, 0], "fast"):
        for kind, message in run_on_ranks(2, raised, in_order, wrong):
            assert kind == LayoutError.__name__
            assert "rank_order must hold each of the ranks 0 to 1 once" in message
