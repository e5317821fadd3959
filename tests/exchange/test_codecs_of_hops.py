"""Chains whose links have codecs of their own: right, in bytes as the formulas say, chosen link by link by a matrix of links."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import longspan
from longspan.errors import InputError
from longspan.exchange import (
    AllGather,
    Auto,
    BFloat16,
    Int8,
    Neighbour,
    Pipelined,
    Ring,
    TopK,
    Topology,
    TwoLevel,
)
from longspan.exchange.auto.hops import cheapest_codecs
from longspan.layout import SequenceLayout
from longspan.plan import Cluster, Link, LinkMatrix, Problem
from longspan.state import ScalarDecay
from tests.compare import worst
from tests.exchange.scan import errors_of_scan, own_decays, traffic_both_ways
from tests.ranks import raised, run_on_ranks

HOPS = (None, "int8", BFloat16())
CHAINS: list[Topology] = [Ring(codec_of_hops=HOPS), Pipelined(num_blocks=3, codec_of_hops=HOPS)]


def errors_of(topology: Topology, order: Any, rank_order: list[int] | None, documents: list[int] | None) -> list[float]:
    layout = SequenceLayout(64, order=order, rank_order=rank_order, documents=documents)
    return errors_of_scan(topology, ScalarDecay, (1, 3, 4, 6), layout, torch.float32)


@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
@pytest.mark.parametrize("topology", CHAINS, ids=lambda each: each.name)
def test_a_chain_whose_hops_are_coded_apart_is_the_scan_but_for_that(topology: Topology, order: str) -> None:
    for rank_order in (None, [2, 0, 3, 1]):
        results = run_on_ranks(4, errors_of, topology, order, rank_order, None)
        assert 2**-12 < worst(error for errors in results for error in errors) < 0.05
        # As far as the first hop all is as it was: who holds the first two runs has an exact state from before.
        exact = replace(topology, codec_of_hops=(None, None, None))
        assert (
            worst(error for errors in run_on_ranks(4, errors_of, exact, order, rank_order, None) for error in errors)
            < 1e-5
        )


def test_states_that_reach_the_next_rank_alone_are_coded_by_their_own_hop() -> None:
    documents = [0, *range(8, 64, 16), 64]
    results = run_on_ranks(4, errors_of, Neighbour(codec_of_hops=HOPS), "contiguous", None, documents)
    # What enters the runs of ranks 1, 2 and 3, over the three hops; nothing enters the first.
    entering = [errors[0] for errors in results]
    assert entering[0] == 0.0 and entering[1] < 1e-6
    assert 1e-4 < entering[2] < 0.05 and 1e-4 < entering[3] < 2**-8


def bytes_sent(topology: Topology, order: Any, rank_order: list[int] | None) -> list[tuple[int, int]]:
    """Bytes that this rank sends forward and backward, and those of the formula for the rank that sends most."""
    layout = SequenceLayout(64, order=order, rank_order=rank_order)
    cluster = Cluster(4, 1, Link(1e-5, 1e9), Link(1e-4, 1e8), 1e-5, 1e9, 1e9)
    shape = (1, 2, 16, 24)
    cost = topology.cost(Problem.of_states(ScalarDecay, (layout.num_segments, *shape), layout), cluster)
    traffic = traffic_both_ways(topology, shape, layout)
    sent = [traffic.of_phase(phase).bytes_sent for phase in ("forward", "backward")]
    return list(zip(sent, (cost.forward.bytes_sent, cost.backward.bytes_sent), strict=True))


@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
@pytest.mark.parametrize("topology", CHAINS, ids=lambda each: each.name)
def test_bytes_are_those_of_each_hop(topology: Topology, order: str) -> None:
    by_rank = run_on_ranks(4, bytes_sent, topology, order, [2, 0, 3, 1])
    for counted in zip(*by_rank, strict=True):
        assert max(sent for sent, _ in counted) == counted[0][1]
    # Two heads of 16 x 24 numbers: as they are, in one byte with scales of blocks of 128 (of 16 x 8, cut in three), and in two.
    plain, halves = 2 * 16 * 24 * 4, 2 * 16 * 24 * 2
    coded = 2 * (16 * 24 + 3 * 4)
    forward = [by_rank[rank][0][0] for rank in (2, 0, 3, 1)]
    there = [plain, coded, halves, 0]
    back = [0, plain, coded, halves] if order == "zigzag" else [0] * 4
    assert forward == [one + other for one, other in zip(there, back, strict=True)]


def matrix(num_ranks: int, rates: dict[tuple[int, int], float]) -> LinkMatrix:
    rows = [[1e12] * num_ranks for _ in range(num_ranks)]
    for (one, other), rate in rates.items():
        rows[one][other] = rows[other][one] = rate
    return LinkMatrix(((1e-5,) * num_ranks,) * num_ranks, tuple(map(tuple, rows)))


def chosen(bound: float, rank_order: list[int]) -> tuple[str, tuple[str | None, ...] | None]:
    layout = SequenceLayout(64, rank_order=rank_order)
    links = matrix(4, {(0, 1): 1e6, (1, 2): 1e8, (2, 3): 1e12})
    fast = Link(1e-5, 1e12)
    auto = Auto(
        cluster=Cluster(4, 1, fast, fast, 1e-5, 2.5e9, 40e9, links=links),
        max_relative_error=bound,
    )
    priced = auto.priced(own_decays((1, 16, 64, 64), layout), layout)
    # Of all chains, however they are coded, the cheapest.
    ring = next(each.topology for each in priced if each.topology.name == "ring")
    wires = ring.wires_of_hops
    return ring.label, None if wires is None else tuple(None if wire is None else wire.name for wire in wires)


def test_each_link_of_a_chain_has_what_is_fastest_over_it() -> None:
    found = run_on_ranks(4, chosen, 0.05, [0, 1, 2, 3])
    assert found == [("ring int8", ("int8", "int8", None))] * 4
    # Where the bound allows nothing but bfloat16, and in the order in which ranks hold the sequence.
    found = run_on_ranks(4, chosen, 2**-8, [3, 2, 1, 0])
    assert found == [("ring bfloat16", (None, "bfloat16", "bfloat16"))] * 4
    # Where a chain passes no slow link there is nothing to choose apart.
    assert run_on_ranks(4, chosen, 0.05, [1, 3, 0, 2]) == [("ring", None)] * 4


def test_the_cheapest_of_each_hop_is_that_of_its_link() -> None:
    problem, fast = Problem(4, 16, 64, 64, ScalarDecay), Link(1e-5, 1e12)
    cluster = Cluster(4, 1, fast, fast, 1e-5, 2.5e9, 40e9, links=matrix(4, {(0, 1): 1e5, (2, 3): 1e8}))
    few = TopK(0.01)
    assert cheapest_codecs(problem, cluster, [None, Int8(), few]) == (few, None, few)
    assert cheapest_codecs(problem, cluster, [None]) == (None, None, None)
    # A chain by it costs no more than one with one way for all.
    apart = Ring(codec_of_hops=cheapest_codecs(problem, cluster, [None, Int8()])).cost(problem, cluster)
    for ring in (Ring(), Ring(codec="int8")):
        assert apart.seconds < ring.cost(problem, cluster).seconds
    same = Ring(codec_of_hops=("int8",) * 3).cost(problem, cluster)
    assert same.seconds == pytest.approx(Ring(codec="int8").cost(problem, cluster).seconds)
    assert same.bytes_sent == Ring(codec="int8").cost(problem, cluster).bytes_sent
    blocks = Pipelined(codec_of_hops=("int8",) * 3).cost(problem, cluster)
    assert blocks.seconds == pytest.approx(Pipelined(codec="int8").cost(problem, cluster).seconds)
    # Coding takes its time however small a block is.
    slow = Cluster(4, 1, Link(1e-5, 1e7), Link(1e-5, 1e7), 1e-5, 2.5e9, 40e9)
    coded, plain = (Pipelined(codec=codec).settled(problem, slow).num_blocks or 0 for codec in ("int8", None))
    assert 1 < coded < plain
    alike = Neighbour(codec_of_hops=("int8",) * 3).cost(problem, cluster)
    assert alike.seconds == pytest.approx(Neighbour(codec="int8").cost(problem, cluster).seconds)


def test_layers_do_not_share_what_a_hop_has_left_out() -> None:
    fed = Ring(codec_of_hops=(None, TopK(0.1, feedback=True)))
    assert fed.remembers_errors and not Ring(codec_of_hops=(None, TopK(0.1))).remembers_errors
    other = fed.for_another_layer()
    assert other.codec_of_hops is not None and fed.codec_of_hops is not None
    assert other.codec_of_hops[1] != fed.codec_of_hops[1] and other.codec_of_hops[0] is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: AllGather(codec_of_hops=(None, "int8")),
            r"AllGather takes no codec_of_hops: its states go from every rank to others in one format. Give it a codec, or take",
        ),
        (lambda: TwoLevel(codec_of_hops=(None,)), r"TwoLevel takes no codec_of_hops"),
        (
            lambda: Ring(codec_of_hops="int8"),  # type: ignore[arg-type]
            r"codec_of_hops must hold a codec, its name or None for each hop.* got 'int8'",
        ),
        (lambda: Ring(codec_of_hops=("zip",)), r"codec must be None, one of .* got 'zip'"),
        (
            lambda: Ring(codec="int8", codec_of_hops=(None,)),
            r"codec_of_hops or one way for all of them, .* Leave one of them out",
        ),
        (lambda: Ring(torch.bfloat16, codec_of_hops=(None,)), r"and got both \(None,\) and torch.bfloat16"),
        (lambda: Ring(codec_inside="int8", codec_of_hops=(None,)), r"Leave one of them out"),
    ],
)
def test_what_does_not_fit_is_refused_when_it_is_written(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def with_hops(dtype: torch.dtype, codec_of_hops: Any) -> None:
    layout = SequenceLayout(16)
    x = torch.randn(1, layout.num_local_tokens, 1, 4, dtype=dtype)
    longspan.linear_attention(x, x, x, layout=layout, exchange=Ring(codec_of_hops=codec_of_hops))


def test_what_does_not_fit_the_ranks_is_refused_on_all_of_them() -> None:
    for kind, message in run_on_ranks(3, raised, with_hops, torch.float32, (None, "int8", None)):
        assert kind == "InputError"
        assert "codec_of_hops has 3 entries for the 2 hops between 3 ranks. Give one for each" in message
    for kind, message in run_on_ranks(3, raised, with_hops, torch.float64, (None, "int8")):
        assert kind == "InputError" and "takes states of torch.float32; got torch.float64" in message
    with pytest.raises(InputError, match="2 entries for the 3 hops between 4 ranks"):
        Ring(codec_of_hops=(None, None)).cost(
            Problem(4, 1, 4, 4, ScalarDecay), Cluster(4, 1, Link(0.0, 1.0), Link(0.0, 1.0), 0.0, 1.0, 1.0)
        )
