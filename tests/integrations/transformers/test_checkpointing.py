"""Gradient checkpointing of both kinds recomputes with the layout of its own forward, whatever ran in between."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import longspan
from longspan import record_traffic
from longspan.integrations.transformers import layout_of
from tests.exchange.drain import drain
from tests.integrations.transformers.families import build
from tests.integrations.transformers.reference import PACKED, PLAIN, gradients_of
from tests.ranks import run_on_ranks


def gradients(name: str, reentrant: bool | None, two_forwards: bool, before: bool) -> dict[str, Tensor]:
    model: Any = build(name).float().train()

    def checkpointing() -> None:
        if reentrant is not None:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            if reentrant:
                model.enable_input_require_grads()

    if before:
        checkpointing()
    longspan.parallelize(model, None)
    if not before:
        checkpointing()
    first = model(**PACKED.arguments()).loss
    # Another forward of other documents before the first one's backward.
    loss = first + model(**PLAIN.arguments()).loss if two_forwards else first
    loss.backward()
    return gradients_of(model)


def compared(name: str, reentrant: bool, two_forwards: bool, before: bool) -> None:
    torch.manual_seed(0)
    want = gradients(name, None, two_forwards, before)
    got = gradients(name, reentrant, two_forwards, before)
    different = [key for key in want if not torch.equal(got[key], want[key])]
    assert got.keys() == want.keys() and not different, different


@pytest.mark.slow_rows(r"jamba-True")
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^qwen3_next-False$")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["jamba", "qwen3_next"])
def test_recomputed_gradients_are_the_same_bits(name: str, reentrant: bool) -> None:
    run_on_ranks(2, compared, name, reentrant, True, name == "jamba")


def states_sent(name: str, reentrant: bool) -> tuple[int, int]:
    """How many messages of states a rank sends as forward does: in forward, and in backward."""
    model: Any = longspan.parallelize(
        build(name).float().train(), None, exchange="pipelined", softmax_method="all_gather"
    )
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()

    def count(traffic: longspan.exchange.Traffic) -> int:
        return sum(event.name == "pipelined" and event.phase == "forward" for event in traffic.events)

    with record_traffic() as forward:
        loss = model(**PLAIN.arguments()).loss
        drain(layout_of(model))
    with record_traffic() as backward:
        loss.backward()
        drain(layout_of(model))
    assert backward.count("backward")
    return count(forward), count(backward)


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^(minimax|qwen3_next)-True$", r"^jamba-False$")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["minimax", "jamba", "qwen3_next"])
def test_a_recomputed_layer_sends_no_states(name: str, reentrant: bool) -> None:
    for forward, backward in run_on_ranks(2, states_sent, name, reentrant):
        assert forward > 0
        assert backward == 0


@pytest.mark.slow
@pytest.mark.parametrize("two_forwards", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(
    "name",
    [
        "mamba",
        "mamba2",
        "falcon_mamba",
        "jamba",
        "recurrent_gemma",
        "minimax",
        "kimi_linear",
        "bamba",
        "lfm2",
        "zamba2",
        "nemotron",
    ],
)
def test_every_family_recomputes_the_same_bits(name: str, reentrant: bool, two_forwards: bool) -> None:
    run_on_ranks(2, compared, name, reentrant, two_forwards, False)
