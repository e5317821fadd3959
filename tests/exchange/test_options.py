"""Topologies and their options; bfloat16 states; what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import longspan
from longspan.errors import InputError
from longspan.exchange import TOPOLOGIES, AllGather, Auto, Pipelined, exchange_named
from longspan.exchange.wire import pack_pairs, unpack_parameter, unpack_states
from longspan.layout import SequenceLayout
from longspan.state import Dense, ScalarDecay, Transition
from tests.compare import worst
from tests.exchange.scan import errors_of_scan
from tests.ranks import run_on_ranks

NAMES = list(TOPOLOGIES)
# Exchanges that hold for a single document.
GENERAL = [name for name in NAMES if name != "neighbour"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_stands_for_the_topology_with_its_options_left_alone(name: str) -> None:
    assert exchange_named(name) == TOPOLOGIES[name]()
    assert exchange_named(TOPOLOGIES[name](torch.bfloat16)) == TOPOLOGIES[name](state_dtype=torch.bfloat16)
    assert TOPOLOGIES[name].name == name
    assert exchange_named("auto") == Auto()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (AllGather, {"state_dtype": torch.float16}, "state_dtype must be None .* or torch.bfloat16; got torch.float16"),
        (Auto, {"state_dtype": "bfloat16"}, "got 'bfloat16'"),
        (Pipelined, {"num_blocks": 0}, "num_blocks must be None or an int of at least 1; got 0"),
        (Pipelined, {"num_blocks": 2.0}, "got 2.0"),
        (Pipelined, {"num_blocks": True}, "got True"),
    ],
)
def test_what_does_not_fit_is_refused_when_it_is_written(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        kind(**options)


@pytest.mark.parametrize("value", ["telepathy", 3, None, AllGather])
def test_what_is_no_exchange_is_refused(value: Any) -> None:
    with pytest.raises(
        InputError, match=r"exchange must be 'auto', one of 'all_gather'.* or a topology with options .* got"
    ):
        exchange_named(value)


@pytest.mark.parametrize("operator", ["linear_attention", "simple_gla", "gated_delta_rule"])
def test_operators_take_an_exchange_and_refuse_a_wrong_one_on_one_device(operator: str) -> None:
    q = torch.randn(1, 6, 2, 4)
    gates = {"g": -torch.rand(1, 6, 2)} if operator != "linear_attention" else {}
    if operator == "gated_delta_rule":
        gates["beta"] = torch.rand(1, 6, 2)
    run = getattr(longspan, operator)
    assert torch.equal(run(q, q, q, **gates), run(q, q, q, **gates, exchange=AllGather()))
    with pytest.raises(InputError, match="telepathy"):
        run(q, q, q, **gates, exchange="telepathy")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16])
def test_transitions_cross_the_wire_bit_for_bit_and_states_rounded_once(
    dtype: torch.dtype, state_dtype: torch.dtype | None
) -> None:
    # An odd number of numbers per state, so that what follows it is not aligned.
    states, parameter = torch.randn(3, 1, 5, 3, dtype=dtype), torch.randn(3, 2, 4, dtype=dtype)
    parameter[0, 0] = torch.tensor([-torch.inf, torch.nan, 1e-40, -0.0], dtype=dtype)
    rows = pack_pairs(states, parameter, state_dtype)
    assert rows.nbytes == states.numel() * (state_dtype or dtype).itemsize + parameter.nbytes
    arrived = unpack_states(rows, states.shape[1:], dtype)
    assert arrived.dtype == dtype
    assert torch.equal(arrived, states.to(state_dtype or dtype).to(dtype))
    bits = unpack_parameter(rows, states.shape[1:], parameter.shape[1:], dtype)
    assert torch.equal(bits.view(torch.int32), parameter.view(torch.int32))


def test_without_transitions_the_wire_holds_states_alone() -> None:
    states = torch.randn(2, 3, 5).transpose(1, 2)
    rows = pack_pairs(states)
    assert rows.is_contiguous() and rows.shape == (2, 15)
    assert torch.equal(unpack_states(rows, (5, 3), torch.float32), states)


def bfloat16_errors(
    name: str, kind: type[Transition], order: Any, dtype: torch.dtype
) -> tuple[list[float], list[float]]:
    layout = SequenceLayout(64, order=order, ranks_per_node=2)
    rounded = TOPOLOGIES[name](torch.bfloat16)
    return (
        errors_of_scan(rounded, kind, (1, 5, 3, 3), layout, dtype),
        errors_of_scan(TOPOLOGIES[name](), kind, (1, 5, 3, 3), layout, dtype),
    )


# The order says who sends, and the other one has two segments a rank.
@pytest.mark.slow_rows(r"-contiguous$")
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^(two_level|all_to_all|all_gather)-Dense-")
@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
@pytest.mark.parametrize("kind", [ScalarDecay, Dense])
@pytest.mark.parametrize("name", GENERAL)
def test_bfloat16_states_cost_a_few_roundings_and_no_more(name: str, kind: type[Transition], order: str) -> None:
    for dtype in (torch.float32, torch.float64):
        results = run_on_ranks(4, bfloat16_errors, name, kind, order, dtype)
        for rounded, exact in results:
            assert worst(exact) < 1e-5
            assert worst(rounded) < 8 * 2**-8
        # Something was rounded.
        assert worst(error for rounded, _ in results for error in rounded) > 2**-12
