"""A first call in inference mode leaves a group and a layout as useful as any other, for later calls and for training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import longspan
from longspan.comm.numbering import destroy
from longspan.exchange import TOPOLOGIES
from longspan.layout import SequenceLayout
from tests.compare import relative_error, worst
from tests.ranks import run_on_ranks


def fresh_group() -> dist.ProcessGroup:
    group = dist.new_group()
    assert isinstance(group, dist.ProcessGroup)
    return group


def inputs_of(layout: SequenceLayout) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (1, layout.seq_len, 2, 4)
    tensors = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name in "qkv"}
    return tensors | {"g": -torch.rand(shape[:3], generator=generator, dtype=torch.float64)}


def layers(layout: SequenceLayout | None, exchange: str, inputs: dict[str, Tensor]) -> list[Tensor]:
    """What layers of every kind make of the inputs, with their final states."""
    q, k, v, g = inputs.values()
    o, state = longspan.simple_gla(q, k, v, g, output_final_state=True, layout=layout, exchange=exchange)
    x, weight = o.flatten(2), torch.linspace(-1.0, 1.0, 24, dtype=torch.float64).view(8, 3)
    y, tokens = longspan.causal_conv1d(x, weight, output_final_state=True, layout=layout)
    shifted = longspan.token_shift(y, layout=layout)
    attended = longspan.softmax_attention(q, k, v, layout=layout)
    return [o, state, y, tokens, shifted, attended]


def errors_after(first: str, exchange: str, order: Any, documents: list[int] | None) -> float:
    layout = SequenceLayout(16, fresh_group(), order, documents)
    everything = inputs_of(layout)
    mine = {name: layout.shard(x) for name, x in everything.items()}
    if first == "inference mode":
        with torch.inference_mode():
            inferred = layers(layout, exchange, mine)
    else:
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            inferred = layers(layout, exchange, mine)
    leaves = {name: x.clone().requires_grad_() for name, x in mine.items()}
    trained = layers(layout, exchange, leaves)
    torch.stack([x.square().sum() for x in trained]).sum().backward()
    gradient = leaves["k"].grad
    assert gradient is not None and bool(gradient.isfinite().all())
    single = SequenceLayout.local(16, documents)
    expected = layers(single, "auto", everything)
    for place in (0, 2, 4, 5):
        expected[place] = layout.shard(expected[place])
    got = [*trained, *inferred] if first == "inference mode" else trained
    error = worst(relative_error(x, expected[number % len(expected)]) for number, x in enumerate(got))
    assert layout.group is not None
    destroy(layout.group)
    return error


@pytest.mark.slow_rows(r"(ring|pipelined|neighbour|all_to_all)-inference", r"(?<!all_gather)-autocast$")
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^two_level-inference")
@pytest.mark.parametrize("first", ["inference mode", "autocast"])
@pytest.mark.parametrize("exchange", [*TOPOLOGIES, "auto"])
def test_training_is_right_after_a_first_call_in(first: str, exchange: str) -> None:
    documents = [0, 3, 5, 7, 11, 13, 16] if exchange == "neighbour" else [0, 3, 11, 16]
    for order in ("contiguous", "zigzag"):
        for error in run_on_ranks(2, errors_after, first, exchange, order, documents):
            assert error < 1e-12
