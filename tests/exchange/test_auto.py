"""auto: the cheapest topology by the cost model, the same on every rank, and the right result whichever it is."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

import longspan
from longspan.errors import InputError
from longspan.exchange import TOPOLOGIES, Auto, record_traffic
from longspan.exchange.auto import calibration, choice
from longspan.exchange.auto.figures import Figures, figures_of, take_figures
from longspan.exchange.chain import Chain
from longspan.exchange.topologies.all_gather import AllGather
from longspan.exchange.topologies.all_to_all import AllToAll
from longspan.exchange.topologies.two_level import TwoLevel
from longspan.layout import ORDERS, SequenceLayout
from longspan.plan import Cluster, Link
from longspan.state import ChannelDecay, Dense, HeadDecay, Identity, Pair, ScalarDecay, Transition
from tests.compare import worst
from tests.exchange.scan import errors_of_scan
from tests.ranks import raised, run_on_ranks

KINDS: list[type[Transition]] = [Identity, HeadDecay, ScalarDecay, ChannelDecay, Dense]

FREE = Link(latency=0.0, bandwidth=1e15)
PATIENT = Link(latency=1.0, bandwidth=1e15)
# Bytes cost, messages do not; a node's links are slow where nodes matter.
NARROW = Link(latency=1e-6, bandwidth=1.0)
SWIFT_FOLDS: Any = {"fold_latency": 0.0, "fold_bandwidth": 1e15, "matmul_rate": 1e18}

CLUSTERS = {
    "all_gather": Cluster(4, 1, PATIENT, PATIENT, gather=FREE, **SWIFT_FOLDS),
    "ring": Cluster(4, 1, replace(PATIENT, gap=1.0), replace(PATIENT, gap=1.0), **SWIFT_FOLDS),
    "pipelined": Cluster(4, 1, NARROW, NARROW, **SWIFT_FOLDS),
    "all_to_all": Cluster(4, 1, PATIENT, PATIENT, swap=FREE, **SWIFT_FOLDS),
    "two_level": Cluster(4, 2, FREE, NARROW, **SWIFT_FOLDS),
}


def own_pair(kind: type[Transition], layout: SequenceLayout, value: float = -0.1) -> Pair:
    shape = (layout.num_segments, 1, 4, 4, 6)
    full = (len(layout.all_segments) if kind.is_known else shape[0], *shape[1:])
    return Pair(kind(torch.full(kind.parameter_shape(full), value)), torch.zeros(shape))


def choices(state_dtype: torch.dtype | None) -> dict[str, Any]:
    """What auto takes on each cluster, and the errors with it."""
    found = {}
    for name, cluster in CLUSTERS.items():
        auto = Auto(state_dtype, cluster)
        layout = SequenceLayout(64, ranks_per_node=cluster.ranks_per_node)
        chosen = auto.resolve(own_pair(ScalarDecay, layout), layout)
        errors: list[float] = []
        if state_dtype is None:
            for order in ORDERS:
                # No document starts with a segment: what enters one that needs nothing is left open.
                for documents in (None, [0, 1, 7, 23, 41]):
                    other = SequenceLayout(41, None, order, documents, ranks_per_node=cluster.ranks_per_node)
                    for kind in KINDS:
                        errors += errors_of_scan(auto, kind, (1, 4, 4, 6), other)
        found[name] = (chosen, errors)
    return found


def test_each_cluster_gets_the_topology_that_suits_it_and_every_one_is_the_scan() -> None:
    for found in run_on_ranks(4, choices, None):
        assert found["all_gather"][0] == AllGather()
        assert found["ring"][0] == Chain("ring")
        assert found["pipelined"][0] == Chain("pipelined", num_blocks=6)
        assert found["all_to_all"][0] == AllToAll()
        assert found["two_level"][0] == TwoLevel()
        for _, errors in found.values():
            assert worst(errors) < 1e-12


def test_the_dtype_of_the_wire_reaches_the_chosen_topology() -> None:
    for found in run_on_ranks(4, choices, torch.bfloat16):
        assert found["all_gather"][0] == AllGather(torch.bfloat16)
        assert found["pipelined"][0] == Chain("pipelined", torch.bfloat16, 6)
        assert found["two_level"][0] == TwoLevel(torch.bfloat16)


def names_of_costs(
    kind: type[Transition], value: float, documents: list[int] | None, ranks_per_node: int | None
) -> list[str]:
    layout = SequenceLayout(64, documents=documents, ranks_per_node=ranks_per_node)
    auto = Auto(cluster=CLUSTERS["two_level"])
    return sorted(each.topology.name for each in auto.priced(own_pair(kind, layout, value), layout))


def test_what_cannot_carry_the_exchange_out_is_no_candidate() -> None:
    always = ["all_gather", "all_to_all", "pipelined", "ring"]
    short = [0, 10, 20, 30, 40, 50, 64]
    cases: list[tuple[Any, list[str]]] = [
        ((HeadDecay, -0.1, None, 2), [*always, "two_level"]),
        # A decay that nothing survives: to the neighbour and no further.
        ((HeadDecay, -200.0, None, 2), [*always, "neighbour", "two_level"]),
        ((ScalarDecay, -200.0, None, 2), [*always, "two_level"]),
        ((ScalarDecay, -0.1, short, 2), [*always, "neighbour", "two_level"]),
        # The layout's nodes are not those of the cluster that was given.
        ((HeadDecay, -0.1, None, 1), always),
        ((HeadDecay, -0.1, None, None), always),
    ]
    for arguments, names in cases:
        for found in run_on_ranks(4, names_of_costs, *arguments):
            assert found == sorted(names)


def measured_and_counted() -> tuple[int, list[str], list[str]]:
    """How often an operator's default measures, and what it sends, in two layers of two lengths each."""
    measured: list[Cluster] = []

    def measure(*args: Any) -> Cluster:
        # As if it had been measured so.
        measured.append(CLUSTERS["all_gather"])
        return measured[-1]

    group = dist.new_group(list(range(4)))
    with pytest.MonkeyPatch.context() as patch, record_traffic() as traffic:
        patch.setattr(calibration, "_measure", measure)
        for seq_len in (64, 100):
            layout = SequenceLayout(seq_len, group=group)
            for _ in range(2):
                q, k, v = (torch.randn(1, layout.num_local_tokens, 2, 4, requires_grad=True) for _ in range(3))
                memory = longspan.write("linear_attention", k, v, layout=layout, exchange=Auto(measure=True))
                memory.read(q).square().sum().backward()
    forward, backward = ([e.name for e in traffic.of_phase(phase).events] for phase in ("forward", "backward"))
    return len(measured), forward, backward


def test_a_group_is_measured_once_and_forward_and_backward_take_the_same_topology() -> None:
    for measured, forward, backward in run_on_ranks(4, measured_and_counted):
        assert measured == 1
        assert forward == backward == ["all_gather"] * 4


def chosen_by_measurement() -> list[Any]:
    layout = SequenceLayout(64)
    return [Auto(measure=True).resolve(own_pair(kind, layout), layout) for kind in KINDS]


# By figures that are given they do so in make test, above.
@pytest.mark.slow
def test_all_ranks_choose_alike_by_what_they_measure() -> None:
    first, *others = run_on_ranks(4, chosen_by_measurement)
    assert all(other == first for other in others)


def layer_whose_documents_end_with_the_ranks() -> Any:
    layout = SequenceLayout(24, documents=[0, 5, 12, 24])
    q, k, v = (torch.randn(1, layout.num_local_tokens, 2, 4) for _ in range(3))
    with record_traffic() as traffic:
        o = longspan.linear_attention(q, k, v, layout=layout)
    own = SequenceLayout.local(12, [0, 5, 12] if layout.rank == 0 else None)
    torch.testing.assert_close(o, longspan.linear_attention(q, k, v, layout=own))
    return traffic.bytes_sent


def test_where_no_state_leaves_a_rank_nothing_is_measured_or_sent() -> None:
    assert run_on_ranks(2, layer_whose_documents_end_with_the_ranks) == [0, 0]


def layer_with(cluster: Cluster) -> None:
    layout = SequenceLayout(64)
    q, k, v = (torch.randn(1, layout.num_local_tokens, 2, 4) for _ in range(3))
    longspan.linear_attention(q, k, v, layout=layout, exchange=Auto(cluster=cluster))


def test_a_cluster_can_be_given_by_hand_and_must_have_the_ranks() -> None:
    assert run_on_ranks(4, layer_with, CLUSTERS["ring"]) == [None] * 4
    for name, message in run_on_ranks(4, raised, layer_with, replace(CLUSTERS["ring"], num_ranks=8)):
        assert name == "InputError" and "the problem has 4 ranks and the cluster 8" in message


def test_auto_takes_figures_or_measures_them() -> None:
    with pytest.raises(InputError, match="both a cluster and measure=True"):
        Auto(cluster=CLUSTERS["ring"], measure=True)


def default_beside_other_exchanges() -> tuple[list[str], list[str], int]:
    """What the default takes twice over, and which threads and groups there are that were not there before."""
    group = dist.new_group(list(range(4)))
    threads = {thread.name for thread in threading.enumerate()}
    taken = []
    with pytest.MonkeyPatch.context() as patch, record_traffic() as traffic:
        patch.setattr(calibration, "_measure", lambda *_: pytest.fail("the default measured"))
        for _ in range(2):
            layout = SequenceLayout(64, group)
            taken.append([Auto().choose(own_pair(kind, layout), layout).topology.name for kind in KINDS])
    assert taken[0] == taken[1]
    made = {thread.name for thread in threading.enumerate()} - threads
    return taken[0], sorted(made), traffic.num_collectives


def test_the_default_is_a_formula_that_measures_and_sends_nothing() -> None:
    first, *others = run_on_ranks(4, default_beside_other_exchanges)
    assert all(other == first for other in others)
    taken, threads, collectives = first
    assert (threads, collectives) == ([], 0)
    assert set(taken) <= set(TOPOLOGIES)


def written_down_and_taken_again() -> tuple[bool, bool, list[str]]:
    """Figures that one group measured, in another one: the same choice, and nothing measured."""
    device = torch.device("cpu")
    first, second = (SequenceLayout(64, dist.new_group(list(range(4)))) for _ in range(2))
    ways = (Auto(measure=True), Auto(measure=True, codec="int8"))
    chosen = [auto.choose(own_pair(kind, first), first) for auto in ways for kind in KINDS]
    written = json.loads(json.dumps(figures_of(first, device).as_json()))
    figures = Figures.from_json(written)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "_measure", lambda *_: pytest.fail("measured again"))
        patch.setattr(choice, "try_out", lambda *_: pytest.fail("tried again"))
        take_figures(second, device, figures)
        again = [auto.choose(own_pair(kind, second), second) for auto in ways for kind in KINDS]
    wrong_ranks = SequenceLayout.for_rank(64, 2, 0, ranks_per_node=2)
    refusals = [
        raised(take_figures, wrong_ranks, device, figures)[1],
        raised(Figures.from_json, {"cluster": 3})[1],
    ]
    return figures == figures_of(first, device), again == chosen, refusals


# A resumed run takes them in make test, in `tests/train/test_resume.py`.
@pytest.mark.slow
def test_measured_figures_are_written_down_and_taken_by_another_run() -> None:
    for is_equal, chose_alike, (ranks, form) in run_on_ranks(4, written_down_and_taken_again):
        assert is_equal and chose_alike
        assert "the figures are of 4 ranks on nodes of 4, and the layout has 2 on nodes of 2" in ranks
        assert "no figures of an exchange" in form
