"""The formulas: times by hand for round numbers, bytes and messages as real ranks count them, what follows for large clusters."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace
from typing import Any

import pytest
import torch

from longspan.comm.background import run_beside
from longspan.errors import InputError
from longspan.exchange import (
    TOPOLOGIES,
    AllGather,
    AllToAll,
    Pipelined,
    Ring,
    Topology,
    TwoLevel,
    by_cost,
    record_traffic,
)
from longspan.exchange.chain_cost import chain_cost
from longspan.exchange.codec import BFloat16, Codec, Int8
from longspan.exchange.topologies.pipelined import best_num_blocks
from longspan.layout import SequenceLayout, group_of
from longspan.plan import Cluster, Link, Problem, WireFormat, gpu_cluster, longest_chain
from longspan.state import ChannelDecay, Dense, HeadDecay, Identity, Pair, ScalarDecay, Transition
from tests.exchange.scan import random_pair
from tests.ranks import run_on_ranks


def with_blocks(name: str, state_dtype: torch.dtype | None = None) -> Topology:
    """The topology of that name, in three blocks where it has blocks."""
    return Pipelined(state_dtype, 3) if name == "pipelined" else TOPOLOGIES[name](state_dtype)


def most_sent(
    topology: str, kind: type[Transition], shape: tuple[int, ...], order: Any, ranks_per_node: int, bfloat16: bool
) -> list[tuple[int, int]]:
    """(bytes, messages) that this rank sends forward and backward."""
    layout = SequenceLayout(64, order=order, ranks_per_node=ranks_per_node)
    pair, own = random_pair(kind, shape, layout, torch.float32), list(layout.own_segments)
    if topology == "neighbour":
        # Where nothing passes through a segment, the neighbours are all there is.
        pair = Pair(kind(torch.full_like(pair.transition.parameter, -200.0)), pair.state)
    parameter = pair.transition.parameter if kind.is_known else pair.transition.parameter[own]
    own_pair = Pair(kind(parameter), pair.state[own])
    resolved = with_blocks(topology, torch.bfloat16 if bfloat16 else None).resolve(own_pair, layout)
    with record_traffic() as traffic:
        arrived = resolved.start(own_pair, layout).wait()
        resolved.start_reverse(kind, arrived.context, torch.ones_like(own_pair.state), layout).wait()
        # A rank that has nothing to wait for may not have sent yet.
        run_beside(group_of(layout), torch.device("cpu"), lambda _: None).wait()
    phases = [traffic.of_phase("forward"), traffic.of_phase("backward")]
    return [(phase.bytes_sent, phase.num_messages) for phase in phases]


def all_most_sent(cases: list[Any]) -> list[list[tuple[int, int]]]:
    return [most_sent(*case) for case in cases]


# What nodes send is counted in `tests/exchange/test_two_level.py`, too.
@pytest.mark.slow_rows(r"^4-2$")
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^3-1$")
@pytest.mark.parametrize(("num_ranks", "ranks_per_node"), [(2, 2), (3, 1), (4, 2)])
def test_bytes_and_messages_are_those_of_the_rank_that_sends_most(num_ranks: int, ranks_per_node: int) -> None:
    cases: list[Any] = []
    for topology in TOPOLOGIES:
        kinds = [HeadDecay] if topology == "neighbour" else [Identity, ChannelDecay, Dense]
        for kind in kinds:
            for shape in ((2, 3, 4, 6), (1, 1, 2, 3)):
                cases += [(topology, kind, shape, order, ranks_per_node, False) for order in ("contiguous", "zigzag")]
        cases.append((topology, kinds[-1], (1, 4, 2, 6), "zigzag", ranks_per_node, True))
    by_rank = run_on_ranks(num_ranks, all_most_sent, cases)
    cluster = replace(gpu_cluster(num_ranks), ranks_per_node=ranks_per_node)
    for index, (topology, kind, shape, order, _, bfloat16) in enumerate(cases):
        layout = SequenceLayout.for_rank(64, num_ranks, 0, order)
        problem = Problem.of_states(kind, (1, *shape), layout, state_bytes=2 if bfloat16 else 4)
        cost = with_blocks(topology).cost(problem, cluster)
        for phase, formula in enumerate((cost.forward, cost.backward)):
            sent = [counts[index][phase] for counts in by_rank]
            counted = tuple(max(counts) for counts in zip(*sent, strict=True))
            assert (formula.bytes_sent, formula.num_messages) == counted, (topology, kind, shape, order, phase)


# A latency of 100 s, a gap of 1 s, a byte a second; a fold takes 10 s and a millionth of a second a byte.
LINK = Link(latency=100.0, bandwidth=1.0, gap=1.0)
SLOW = Cluster(4, 1, LINK, LINK, fold_latency=10.0, fold_bandwidth=1e6, matmul_rate=1e6)
# A state has 4 rows of 2 × 3 numbers, 96 bytes; with a number of each row's 8 key channels, 128 bytes.
STATE, PAIR = 96, 128
LAYER = Problem(num_ranks=4, num_rows=4, key_size=2, value_size=3, transition=ChannelDecay)


@pytest.mark.parametrize(
    ("topology", "forward", "backward"),
    [
        ("all_gather", 3 * (100 + PAIR) + 3 * 10, 3 * (100 + STATE) + 3 * 10),
        ("ring", 3 * (100 + STATE) + 2 * 10, 3 * (100 + STATE) + 2 * 10),
        # Three messages one after another from each rank, a quarter of the rows each, there and back; a fold of three segments.
        (
            "all_to_all",
            (100 + 2 + 3 * PAIR / 4) + (100 + 2 + 3 * STATE / 4) + 3 * 10,
            2 * (100 + 2 + 3 * STATE / 4) + 3 * 10,
        ),
        ("neighbour", 100 + STATE, 100 + STATE),
    ],
)
def test_times_are_those_worked_out_by_hand(topology: str, forward: float, backward: float) -> None:
    cost = TOPOLOGIES[topology]().cost(LAYER, SLOW)
    assert cost.forward.seconds == pytest.approx(forward, rel=1e-4)
    assert cost.backward.seconds == pytest.approx(backward, rel=1e-4)


def test_blocks_follow_each_other_through_the_ranks() -> None:
    # Three blocks: the first takes three hops and two folds, each other one follows after its gap, its bytes and its fold.
    first, behind = 3 * (100 + STATE / 3) + 2 * 10, 1 + STATE / 3 + 10
    assert Pipelined(None, 3).cost(LAYER, SLOW).forward.seconds == pytest.approx(first + 2 * behind, rel=1e-4)
    assert Pipelined(None, 3).cost(LAYER, SLOW).forward.num_steps == 2 + 3
    assert Pipelined(None, 1).cost(LAYER, SLOW).forward.seconds == Ring().cost(LAYER, SLOW).forward.seconds
    # A state of three columns has no more than three blocks.
    assert (
        Pipelined(None, 100).cost(LAYER, SLOW).forward.seconds == Pipelined(None, 3).cost(LAYER, SLOW).forward.seconds
    )


def test_two_levels_by_hand() -> None:
    # Two nodes of two ranks: two rows a rank in its node, one on its rail; a message each way at each level, there and back.
    cluster = replace(SLOW, ranks_per_node=2)
    there, back = (100 + 2 * PAIR / 4) + (100 + PAIR / 4), (100 + 2 * STATE / 4) + (100 + STATE / 4)
    cost = TwoLevel().cost(LAYER, cluster)
    assert cost.forward.seconds == pytest.approx(there + back + 3 * 10, rel=1e-4)
    assert cost.backward.seconds == pytest.approx(2 * back + 3 * 10, rel=1e-4)


def test_links_between_nodes_are_shared_by_all_ranks_that_send_at_once() -> None:
    shared = Cluster(4, 2, replace(LINK, latency=0.0, gap=0.0), replace(LINK, sharing=2.0), 10.0, 1e6, 1e6)
    # Two of the three quarters leave the node, for both ranks of the node.
    there, back = 100 + 1 + 2 * 2 * PAIR / 4, 100 + 1 + 2 * 2 * STATE / 4
    assert AllToAll().cost(LAYER, shared).forward.seconds == pytest.approx(there + back + 3 * 10, rel=1e-4)
    # The ring crosses once, and has the link for itself.
    expected = 2 * STATE + (100 + STATE) + 2 * 10
    assert Ring().cost(LAYER, shared).forward.seconds == pytest.approx(expected, rel=1e-4)


def test_dense_transitions_cost_matrix_products() -> None:
    dense = replace(LAYER, transition=Dense)
    flops = 4 * 2 * 2 * 2 * 3
    difference = Ring().cost(dense, replace(SLOW, matmul_rate=1.0)).forward.seconds
    difference -= Ring().cost(LAYER, SLOW).forward.seconds
    assert difference == pytest.approx(2 * flops, rel=1e-3)


def test_measured_collectives_take_the_place_of_links() -> None:
    measured = replace(SLOW, gather=Link(5.0, 2.0), swap=Link(7.0, 4.0))
    assert AllGather().cost(LAYER, measured).forward.seconds == pytest.approx(3 * (5 + PAIR / 2) + 30, rel=1e-4)
    expected = 7 + 3 * PAIR / 4 / 4 + 7 + 3 * STATE / 4 / 4 + 30
    assert AllToAll().cost(LAYER, measured).forward.seconds == pytest.approx(expected, rel=1e-4)
    assert measured.with_ranks(8).swap is None


def test_a_measured_chain_takes_the_place_of_latencies() -> None:
    # Folds of a latency of 10 s are part of a hop, those of a block part of what it follows by.
    measured = replace(SLOW, hop=50.0, block=20.0)
    assert Ring().cost(LAYER, measured).forward.seconds == pytest.approx(3 * (50 + STATE), rel=1e-4)
    expected = 3 * (50 + STATE / 3) + 2 * (20 + STATE / 3)
    assert Pipelined(None, 3).cost(LAYER, measured).forward.seconds == pytest.approx(expected, rel=1e-4)


def test_all_ranks_code_blocks_that_follow_at_once() -> None:
    # Half a fold's latency a message, once for the first block's hops and, with all at it, four times as long behind it.
    wire = WireFormat("bytes", 4, 0.1, passes=0.0, starts=0.5)
    shared = replace(SLOW, fold_sharing=4.0)
    first, behind = 3 * (100 + STATE / 3 + 5) + 2 * 10, 1 + STATE / 3 + 4 * 10 + 4 * 5
    coded = replace(LAYER, wire=wire)
    for wires in (None, [wire] * 3):
        each = chain_cost(coded, shared, 3, wire, wires)
        assert each.seconds == pytest.approx(first + 2 * behind, rel=1e-4)
    # A chain of one block has one rank at work at a time.
    assert chain_cost(coded, shared, 1, wire).seconds == pytest.approx(3 * (100 + STATE + 5) + 2 * 10, rel=1e-4)


# Figures as measured on four emulated hosts with links of 100 Mbit/s, which share two cores; and there, in the same minutes, the
# shortest of three times in ms, there and back, of states of 16 heads of 128 x 128, by the number of blocks.
HUNDRED_MBIT = Link(latency=152e-6, bandwidth=12e6, gap=58e-6, sharing=1.2)
MEASURED = Cluster(
    4,
    1,
    HUNDRED_MBIT,
    HUNDRED_MBIT,
    fold_latency=52e-6,
    fold_bandwidth=3638e6,
    matmul_rate=42e9,
    fold_sharing=4.4,
    gather=Link(1315e-6, 10e6),
    swap=Link(3517e-6, 8e6),
    hop=1340e-6,
    block=411e-6,
)
TIMES: dict[str, dict[int, float]] = {
    "bfloat16": {1: 264.0, 2: 179.1, 4: 140.1, 8: 121.9, 12: 117.0, 16: 118.2, 32: 122.7, 64: 195.7},
    "int8": {1: 140.8, 2: 112.0, 4: 87.8, 8: 96.7, 16: 99.7, 32: 136.9},
}


@pytest.mark.parametrize("codec", [BFloat16(), Int8()])
def test_measured_links_of_100_mbit_make_as_many_blocks_as_are_fastest_there(codec: Codec) -> None:
    problem = Problem(num_ranks=4, num_rows=16, key_size=128, value_size=128, transition=ScalarDecay)
    times = TIMES[codec.format.name]
    cost = Pipelined(codec=codec).cost(problem, MEASURED)
    assert cost.num_blocks is not None
    # Between two counts that were measured, the slower one's time.
    counts = sorted(times)
    at = bisect_left(counts, cost.num_blocks)
    taken = max(times[count] for count in counts[at - (counts[at] != cost.num_blocks) : at + 1])
    assert taken <= 1.05 * min(times.values())
    # And it costs less than a ring, as there.
    assert cost.seconds < Ring(codec=codec).cost(problem, MEASURED).seconds


def test_what_computation_hides_and_what_it_does_not() -> None:
    gathered = AllGather().cost(LAYER, SLOW).forward
    # The folds come when the caller waits.
    assert gathered.exposed(1e9) == pytest.approx(30, rel=1e-4)
    assert gathered.exposed(100.0) == pytest.approx(gathered.seconds - 100)
    ring = Ring().cost(LAYER, SLOW).forward
    assert ring.exposed(1e9) == 0
    assert ring.exposed(0.0) == ring.seconds


@pytest.mark.parametrize(
    ("order", "documents", "messages"),
    [
        ("contiguous", None, 3),
        ("zigzag", None, 6),
        # Every segment of 10 starts with a new document: nothing is sent.
        ("contiguous", [0, 10, 20, 30, 40], 0),
        # A document starts inside every segment: all states leave at once.
        ("contiguous", [0, 5, 15, 25, 35, 40], 1),
        # The second document starts in the second segment and goes on through two more.
        ("contiguous", [0, 15, 40], 2),
        ("contiguous", [0, 1, 40], 3),
        # Segments of 5. The one that starts at 15 and the next are on one rank: the chain goes on through both.
        ("zigzag", [0, 12, 40], 4),
        # It is cut in the first of the two.
        ("zigzag", [0, 17, 40], 3),
    ],
)
def test_the_longest_chain_is_how_many_messages_wait_for_each_other(
    order: Any, documents: list[int] | None, messages: int
) -> None:
    layout = SequenceLayout.for_rank(40, 4, 0, order, documents)
    assert longest_chain(layout) == messages
    assert Problem.of_states(Identity, (1, 1, 1, 1, 1), layout).chain == messages


def test_documents_shorten_the_serial_topologies_alone() -> None:
    packed = replace(LAYER, longest_chain=1)
    assert Ring().cost(packed, SLOW).forward.seconds == pytest.approx(100 + STATE)
    assert AllGather().cost(packed, SLOW) == AllGather().cost(LAYER, SLOW)


def layer(num_ranks: int, kind: type[Transition] = ChannelDecay) -> Problem:
    return Problem(num_ranks=num_ranks, num_rows=4096, key_size=128, value_size=128, transition=kind)


def test_what_a_rank_sends_grows_with_the_ranks_for_all_gather_alone() -> None:
    sent = {
        name: [TOPOLOGIES[name]().cost(layer(size), gpu_cluster(size)).bytes_sent for size in (64, 4096)]
        for name in TOPOLOGIES
    }
    assert sent["all_gather"][1] / sent["all_gather"][0] == pytest.approx(4095 / 63)
    for name in TOPOLOGIES:
        if name != "all_gather":
            assert sent[name][1] / sent[name][0] < 1.25


def test_many_nodes_make_two_level_the_cheapest() -> None:
    problem = replace(layer(4096), num_rows=16)
    topologies = [kind() for name, kind in TOPOLOGIES.items() if name != "neighbour"]
    costs = [each.cost for each in by_cost(topologies, problem, gpu_cluster(4096))]
    assert costs[0].topology == "two_level"
    assert [cost.seconds for cost in costs] == sorted(cost.seconds for cost in costs)


def test_blocks_are_many_where_bytes_cost_and_one_where_messages_do() -> None:
    problem = layer(8)
    slow_wire = Link(latency=1e-6, bandwidth=1e6, gap=1e-6)
    slow_start = Link(latency=1.0, bandwidth=1e15, gap=1.0)
    assert best_num_blocks(problem, replace(gpu_cluster(8, 1), inter=slow_wire)) == 128
    assert best_num_blocks(problem, replace(gpu_cluster(8, 1), inter=slow_start)) == 1
    assert Pipelined().cost(problem, replace(gpu_cluster(8, 1), inter=slow_wire)).num_blocks == 128


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="the problem has 8 ranks and the cluster 4"):
        Ring().cost(layer(8), gpu_cluster(4))
    with pytest.raises(InputError, match="10 ranks do not make nodes of 8"):
        gpu_cluster(10, 8)
    with pytest.raises(InputError, match=r"bandwidth must be more than 0 bytes per second; got 0\.0"):
        Link(1.0, 0.0)
    with pytest.raises(InputError, match="latency must be a number of at least 0; got nan"):
        Link(float("nan"), 1.0)
    with pytest.raises(InputError, match=r"fold_sharing must be at least 1; got 0\.5"):
        replace(SLOW, fold_sharing=0.5)
    with pytest.raises(InputError, match="num_rows must be at least 1; got 0"):
        replace(LAYER, num_rows=0)
