"""The benchmark of softmax attention times what is right, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import chain, count, repeat
from typing import Any

import pytest
from torch import Tensor

from benchmarks import softmax_sides
from benchmarks.softmax import kept_bytes
from benchmarks.softmax_peers import PEERS, unavailable
from benchmarks.softmax_sides import (
    FLOOR,
    TRIES,
    Measured,
    Setting,
    Side,
    Step,
    Tensors,
    _measure_on_rank,
    our_step,
    ours,
)
from longspan.layout import SequenceLayout
from tests.ranks import run_on_ranks

ROUNDS = 2


def _measured(setting: Setting, *sides: Side) -> list[Measured]:
    results: list[Measured] = run_on_ranks(2, _measure_on_rank, setting, sides, ROUNDS)[0]
    return results


def _spoilt(number: int, tensors: Tensors, layout: SequenceLayout, setting: Setting) -> Step:
    """Ours, with one of o, dq, dk and dv a little off on the last rank alone."""
    run = our_step("all_gather", tensors, layout, setting)

    def spoilt() -> tuple[Tensor, ...]:
        results = list(run())
        if layout.rank == layout.num_ranks - 1:
            results[number] = results[number] * 1.01
        return tuple(results)

    return spoilt


def test_right_sides_are_timed_once_a_round() -> None:
    sides = (FLOOR, ours("all_gather", "contiguous"), ours("ring", "zigzag"), ours("ulysses", "zigzag"))
    for side, result in zip(sides, _measured(Setting(64), *sides), strict=True):
        assert result.is_right, side.name
        assert len(result.times) == ROUNDS, side.name


@pytest.mark.parametrize(
    "setting",
    [
        Setting(64, num_kv_heads=2),
        Setting(64, causal=False),
        Setting(64, window=9),
        Setting(64, documents=(0, 5, 40, 64)),
    ],
    ids=["grouped heads", "both ways", "window", "documents"],
)
def test_every_setting_is_checked_against_plain_attention(setting: Setting) -> None:
    (result,) = _measured(setting, ours("all_gather", "zigzag"))
    assert result.is_right


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^d[qk]$")
@pytest.mark.parametrize("number", range(4), ids=["o", "dq", "dk", "dv"])
def test_a_side_that_is_wrong_on_one_rank_is_not_timed(number: int) -> None:
    wrong = Side("spoilt", "all_gather", "contiguous", partial(_spoilt, number))
    spoilt, right = _measured(Setting(64), wrong, ours("all_gather", "contiguous"))
    assert not spoilt.is_right
    assert spoilt.times == ()
    assert right.is_right and len(right.times) == ROUNDS


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^torch ring-zigzag$", r"^torch ring, gathering-contiguous$")
@pytest.mark.parametrize(
    "peer", [peer for peer in PEERS if peer.kind != "ulysses"], ids=lambda x: f"{x.name}-{x.order}"
)
def test_the_ring_of_torch_is_run_as_it_should_be(peer: Side) -> None:
    reason = unavailable(peer)
    if reason is not None:
        pytest.skip(reason)
    (result,) = _measured(Setting(64), peer)
    assert result.is_right


def _num_calls_of_a_round() -> list[int]:
    """With nobody else on the machine, with somebody in the first call, and with somebody always."""
    module: Any = softmax_sides
    original = module._user_seconds_of_machine
    clocks: list[Iterator[float]] = [repeat(0.0), chain([0.0], repeat(1e3)), count(0.0, 1e3)]
    calls: list[int] = []
    try:
        for index, clock in enumerate(clocks):
            module._user_seconds_of_machine = partial(next, clock)
            calls.append(0)

            def step(index: int = index) -> None:
                calls[index] += 1

            ((call,),) = softmax_sides.in_turn([step], 1)
            assert call.seconds >= 0
    finally:
        module._user_seconds_of_machine = original
    return calls


def test_a_call_that_other_programs_disturb_is_timed_again_on_every_rank() -> None:
    assert run_on_ranks(2, _num_calls_of_a_round) == [[1, 2, TRIES]] * 2


def test_gathered_keys_are_what_grows_with_the_ranks() -> None:
    for method in ("ring", "ulysses"):
        assert kept_bytes(method, 8192, 4) == kept_bytes(method, 4096, 2)
    share = 2048 * 8 * 64 * 4
    assert kept_bytes("all_gather", 8192, 4) - kept_bytes("ring", 8192, 4) == 2 * 3 * share
