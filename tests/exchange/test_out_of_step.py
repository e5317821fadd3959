"""Ranks out of step get an error on every rank, soon, and the next correct call on the same group is right."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import longspan
from longspan.comm.numbering import destroy
from longspan.errors import ExchangeError
from longspan.layout import SequenceLayout
from tests.attention.test_partial_losses import ALL, error_of
from tests.ranks import run_on_ranks
from tests.variants import Inputs, make_inputs, shard_gates

SEQ_LEN = 24
SHORT = [0, 3, 5, 7, 10, 12, 14, 17, 19, 21, 24]


def plain_group(seconds: float) -> dist.ProcessGroup:
    """A group as users have it: torch's own checks of collectives, on in these tests, would find the faults first."""
    group = dist.new_group(timeout=timedelta(seconds=seconds))
    assert isinstance(group, dist.ProcessGroup)
    return group


def outputs_of(name: str, inputs: Inputs, layout: SequenceLayout, exchange: str, num_layers: int) -> list[Tensor]:
    """Layers one on top of the other."""
    q, k, v = (layout.shard(x.detach()).requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    gates = shard_gates(name, {key: x.detach() for key, x in inputs.gates.items()}, layout)
    outputs = []
    for _ in range(num_layers):
        o = longspan.write(name, k, v, **gates, layout=layout, exchange=exchange, chunk_size=4).read(q)
        outputs.append(o)
        v = torch.tanh(o)
    return outputs


Fault = Callable[[str, Inputs, SequenceLayout, str], None]


def skips_a_layer(name: str, inputs: Inputs, layout: SequenceLayout, exchange: str) -> None:
    outputs_of(name, inputs, layout, exchange, 2 if layout.rank == 0 else 3)[-1].sum().backward()


def goes_on_without_backward(name: str, inputs: Inputs, layout: SequenceLayout, exchange: str) -> None:
    (o,) = outputs_of(name, inputs, layout, exchange, 1)
    if layout.rank != 0:
        o.sum().backward()
    outputs_of(name, inputs, layout, exchange, 1)[0].sum().backward()


def detaches_the_last_layer(name: str, inputs: Inputs, layout: SequenceLayout, exchange: str) -> None:
    for _ in range(2):
        outputs = outputs_of(name, inputs, layout, exchange, 3)
        outputs[-1 if layout.rank else 1].sum().backward()


FAULTS: dict[str, Fault] = {
    "skips a layer": skips_a_layer,
    "goes on without backward": goes_on_without_backward,
    "detaches the last layer": detaches_the_last_layer,
}


def what_became_of(fault: str, name: str, exchange: str, order: Any) -> tuple[str, str, float]:
    level = dist.get_debug_level()
    dist.set_debug_level(dist.DebugLevel.OFF)
    try:
        documents = SHORT if exchange == "neighbour" else None
        group = plain_group(30)
        layout = SequenceLayout(SEQ_LEN, group, order, documents)
        inputs = make_inputs(name, SEQ_LEN, documents=documents, value_size=3)
        raised = "nothing", ""
        try:
            FAULTS[fault](name, inputs, layout, exchange)
        except ExchangeError as error:
            raised = type(error).__name__, str(error)
        dist.barrier()
        error_after = error_of(name, inputs, layout, exchange, lambda rank: ALL)
        destroy(group)
        return *raised, error_after
    finally:
        dist.set_debug_level(level)


def what_is_said_of_a_rank_that_does_not_come(exchange: str) -> tuple[str, float]:
    level = dist.get_debug_level()
    dist.set_debug_level(dist.DebugLevel.OFF)
    try:
        group = plain_group(6)
        layout, inputs = SequenceLayout(SEQ_LEN, group), make_inputs("simple_gla", SEQ_LEN)
        (o,) = outputs_of("simple_gla", inputs, layout, exchange, 1)
        dist.barrier()
        message = ""
        try:
            if layout.rank == 0:
                o.sum().backward()
            else:
                dist.barrier()
                o.sum().backward()
        except ExchangeError as error:
            message = str(error)
        if layout.rank == 0:
            dist.barrier()
        if not message:
            # Who waits for nothing in its own backward is told by the next exchange.
            with pytest.raises(ExchangeError) as told:
                outputs_of("simple_gla", inputs, layout, exchange, 1)
            message = str(told.value)
        error_after = error_of("simple_gla", inputs, layout, exchange, lambda rank: ALL)
        destroy(group)
        return message, error_after
    finally:
        dist.set_debug_level(level)


@pytest.mark.parametrize(
    "exchange", ["all_gather", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ring", "all_to_all"))]
)
def test_a_rank_that_does_not_come_is_named_when_the_time_of_the_group_is_over(exchange: str) -> None:
    results = run_on_ranks(2, what_is_said_of_a_rank_that_does_not_come, exchange)
    assert all(f"backward {exchange} of exchange 1" in message for message, _ in results), results
    assert "rank 0 of 2 has waited 6 s" in results[0][0] and "rank 1 has waited" in results[0][0]
    assert all(error < 1e-10 for _, error in results)


@pytest.mark.slow_rows(
    r"goes on without backward-(neighbour|all_to_all|two_level)",
    r"skips a layer-(neighbour|all_to_all)",
    r"^detaches the last layer-(?!all_gather-3)",
)
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^skips a layer-(ring|all_gather)-3$", r"^goes on without backward-all_gather-3$")
@pytest.mark.parametrize("num_ranks", [pytest.param(2, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("exchange", ["all_gather", "ring", "neighbour", "all_to_all", "two_level"])
@pytest.mark.parametrize("fault", FAULTS)
def test_ranks_out_of_step_are_an_error_on_every_rank_and_the_next_call_is_right(
    fault: str, exchange: str, num_ranks: int
) -> None:
    for name in ("simple_gla", "gated_delta_rule")[num_ranks - 2 :]:
        for rank, (kind, message, error) in enumerate(
            run_on_ranks(num_ranks, what_became_of, fault, name, exchange, "zigzag", timeout=60)
        ):
            assert kind in ("OutOfStepError", "ExchangeError"), (name, rank, message)
            assert error < 1e-10, (name, rank)
