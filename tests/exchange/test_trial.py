"""auto tries what the model finds close: the faster one is taken, once for each size, unseen by whatever watches the layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from longspan.exchange import Auto, Int8, record_traffic
from longspan.exchange.auto import calibration, choice, trial
from longspan.exchange.auto.timing import RankClock
from longspan.exchange.topologies.all_gather import AllGather
from longspan.exchange.topologies.ring import Ring
from longspan.layout import SequenceLayout
from longspan.plan import Cluster, Link
from longspan.state import Pair, ScalarDecay
from tests.ranks import run_on_ranks

NUM_RANKS = 4
# Messages take a second, whatever they carry; folds nothing. A ring has 3 of them one way, an all-gather so many steps of 0.6 s.
SECOND = Link(latency=1.0, bandwidth=1e15)
SWIFT_FOLDS: Any = {"fold_latency": 0.0, "fold_bandwidth": 1e15, "matmul_rate": 1e18}
GATHERING = Cluster(NUM_RANKS, 1, SECOND, SECOND, gather=Link(0.6, 1e15), swap=Link(9.0, 1e15), **SWIFT_FOLDS)
MODELLED = {"all_gather": 3.6, "ring": 6.0, "pipelined": 6.0, "all_to_all": 36.0}


def pair_of(layout: SequenceLayout, value_size: int) -> Pair:
    shape = (1, 1, 2, 4, value_size)
    return Pair(ScalarDecay(torch.full(ScalarDecay.parameter_shape(shape), -0.1)), torch.ones(shape))


def names_by_measured(measured: dict[str, float]) -> tuple[list[str], list[str], list[str]]:
    """What auto takes for one document, then for two, and what was tried in either."""
    group = dist.new_group(list(range(NUM_RANKS)))
    tried: list[str] = []

    def seconds(topology: Any, *args: Any) -> tuple[float, float]:
        tried.append(topology.name)
        return measured[topology.name], 0.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "_measure", lambda *_: GATHERING)
        patch.setattr(trial, "exchange_seconds", seconds)
        taken, tried_in_turn = [], []
        for documents in (None, [0, 30, 64]):
            layout = SequenceLayout(64, group, documents=documents)
            priced = Auto(measure=True).priced(pair_of(layout, 4), layout)
            if documents is None:
                assert {each.topology.name: round(each.seconds, 6) for each in priced} == MODELLED
            taken.append(Auto(measure=True).choose(pair_of(layout, 4), layout).topology.name)
            tried_in_turn.append(sorted(set(tried)))
            tried.clear()
    first, second = tried_in_turn
    return taken, first, second


def choices() -> list[tuple[list[str], list[str], list[str]]]:
    as_modelled = dict(MODELLED)
    return [
        names_by_measured(measured)
        for measured in (
            as_modelled,
            as_modelled | {"ring": 3.5},
            dict.fromkeys(MODELLED, 1.0),
            dict.fromkeys(MODELLED, 20.0),
        )
    ]


def test_the_fastest_on_trial_of_those_that_are_close_is_taken_once_for_each_size() -> None:
    for as_modelled, faster, far_apart, far_out in run_on_ranks(NUM_RANKS, choices):
        close = ["all_gather", "pipelined", "ring"]
        # Two documents leave a chain of two messages, 4 s as modelled.
        assert as_modelled == (["all_gather", "all_gather"], close, [])
        assert faster == (["ring", "ring"], close, [])
        # The others are modelled at more than twice what the first one takes.
        assert far_apart == (["all_gather", "all_gather"], ["all_gather"], [])
        # The model was so far out that all of them might be faster.
        assert far_out[1] == sorted(MODELLED)


def asked_in_turn(exchanges: list[Auto]) -> list[list[str]]:
    """What choices ask to be tried, one after another, for states of one size on one group: topologies, with their codecs."""
    group = dist.new_group(list(range(NUM_RANKS)))
    asked: list[list[str]] = []

    def try_out(candidates: list[trial.Candidate], *_: Any) -> list[float | None]:
        asked.append([each.name for each in candidates])
        return [each.modelled_seconds for each in candidates]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "_measure", lambda *_: GATHERING)
        patch.setattr(choice, "try_out", try_out)
        for exchange in exchanges:
            layout = SequenceLayout(64, group)
            exchange.choose(pair_of(layout, 4), layout)
    return asked


def test_a_trial_of_states_as_they_are_says_nothing_of_codecs() -> None:
    plain, coded = Auto(measure=True), Auto(measure=True, codec="int8")
    bounded, wider = (Auto(measure=True, max_relative_error=bound) for bound in (0.05, 0.9))
    ways = [plain, coded, Auto(measure=True, codec=Int8(8)), bounded, wider]
    for asked in run_on_ranks(NUM_RANKS, asked_in_turn, [*ways, *ways]):
        assert len(asked) == len(ways)
        assert not any("int8" in name for name in asked[0])
        assert all(name.endswith(" int8") for name in asked[1] + asked[2])


class Seen(TorchDispatchMode):
    """Which operations the caller makes."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def tried_for_real() -> tuple[list[float | None], list[str], int, bool]:
    layout = SequenceLayout(64)
    pair = pair_of(layout, 4)
    ring = Ring().resolve(pair, layout)
    candidates = [
        trial.Candidate("all_gather", AllGather(), 0.0),
        trial.Candidate("ring", ring, 0.0),
        trial.Candidate("ring", ring, 1e9),
    ]
    with record_traffic() as traffic, Seen() as seen:
        found = trial.try_out(candidates, pair, layout)
    forward, backward = trial.exchange_seconds(ring, pair, pair.state, RankClock(layout, pair.state.device))
    return [*found, forward, backward], seen.names, traffic.num_collectives, bool((pair.state == 1).all())


def test_a_trial_gives_all_ranks_the_same_times_and_nobody_sees_it() -> None:
    by_rank = run_on_ranks(NUM_RANKS, tried_for_real)
    for seconds, seen, counted, is_untouched in by_rank:
        assert seconds == by_rank[0][0]
        first, second, hopeless, *both_ways = seconds
        assert first and second and hopeless is None and min(both_ways) > 0
        assert seen == [] and counted == 0 and is_untouched


def failing_trial() -> str:
    class Broken(AllGather):
        def start(self, *args: Any) -> Any:
            raise OSError("no way out")

    layout = SequenceLayout(64)
    with pytest.raises(OSError) as raised:
        trial.try_out([trial.Candidate("broken", Broken(), 0.0)], pair_of(layout, 4), layout)
    return str(raised.value)


def test_what_goes_wrong_in_a_trial_reaches_the_caller() -> None:
    assert run_on_ranks(2, failing_trial) == ["no way out"] * 2
