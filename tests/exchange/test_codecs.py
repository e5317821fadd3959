"""Codecs on the wire: errors within their bounds, bytes as stated, exchanges right but for them; feedback; what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import longspan
from longspan import SequenceLayout, parallelize
from longspan.errors import InputError
from longspan.exchange import (
    TOPOLOGIES,
    AllGather,
    AllToAll,
    Auto,
    BFloat16,
    Codec,
    ErrorFeedback,
    Float8,
    Int8,
    Pipelined,
    Ring,
    TopK,
    Topology,
    TwoLevel,
)
from longspan.exchange.codec import CODECS, codec_named, codecs_within
from longspan.exchange.wire import Wire
from longspan.plan import Cluster, Link, Problem
from longspan.state import Dense, ScalarDecay, Transition
from tests.compare import relative_error, worst
from tests.exchange.scan import errors_of_scan, own_decays, traffic_both_ways
from tests.models.tiny import tiny_model
from tests.ranks import raised, run_on_ranks

CODED = [BFloat16(), Int8(), Int8(8), Int8(7), Float8(), Float8(20), TopK(0.25), TopK(0.01), TopK(1.0)]
GENERAL = [name for name in TOPOLOGIES if name != "neighbour"]


def samples(shape: tuple[int, ...]) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    normal = torch.randn(shape, generator=random)
    one = torch.zeros(shape)
    one[..., 3, 2] = -5e4
    return {
        "normal": normal,
        "of many sizes": normal * torch.exp(8 * torch.randn(shape, generator=random)),
        "tiny": normal * 1e-30,
        "huge": normal * 1e30,
        "one number": one,
        "alike": torch.full(shape, 0.37),
        "zero": torch.zeros(shape),
    }


@pytest.mark.parametrize("codec", CODED, ids=repr)
@pytest.mark.parametrize("size", [(16, 16), (5, 7), (1, 4)])
def test_the_error_of_every_head_is_within_the_codecs_bound(codec: Codec, size: tuple[int, int]) -> None:
    shape = (2, 1, 3, *size)
    for name, states in samples((*shape[:-2], max(4, size[0]), max(3, size[1]))).items():
        wire = Wire(codec=codec)
        rows = wire.pack(states)
        assert rows.dtype == torch.uint8 and rows.shape == (2, 3 * codec.format.row_bytes(states[0, 0, 0].numel()))
        arrived = wire.unpack(rows, states.shape[1:], torch.float32)
        error = (arrived - states).double().flatten(-2).norm(dim=-1)
        exact = states.double().flatten(-2).norm(dim=-1)
        assert arrived.shape == states.shape and bool((error <= codec.format.worst_error * exact).all()), name


@pytest.mark.parametrize("codec", [Int8(16), Float8(16)], ids=repr)
def test_the_bound_is_nearly_met_by_numbers_made_for_it(codec: Codec) -> None:
    # The largest number sets the scale, and all others are as far as can be from what the format has.
    scale = 1.0
    largest, others = (127.0, 0.5) if isinstance(codec, Int8) else (448.0, 17.0)
    states = torch.full((1, 1, 1, 4, 4), others * scale)
    states[..., 0, 0] = largest
    wire = Wire(codec=codec)
    arrived = wire.unpack(wire.pack(states), states.shape[1:], torch.float32)
    number = (arrived - states)[..., 1, 1].abs()
    assert float(number) >= (0.49 * scale if isinstance(codec, Int8) else 0.05 * others)


def test_a_bound_is_that_of_its_formula() -> None:
    assert Int8(128).format.worst_error == pytest.approx(math.sqrt(128) / 254)
    assert Float8().format.worst_error == pytest.approx(1 / 16, rel=1e-3)
    assert TopK(0.19).format.worst_error == pytest.approx(0.9 + 2**-8)


@pytest.mark.parametrize("codec", CODED, ids=repr)
def test_what_is_not_finite_stays_so_in_its_own_head_alone(codec: Codec) -> None:
    for value in (math.nan, math.inf):
        states = torch.randn(1, 2, 2, 8, 8)
        states[0, 1, 0, 3, 3] = value
        wire = Wire(codec=codec)
        arrived = wire.unpack(wire.pack(states), states.shape[1:], torch.float32)
        assert not arrived[0, 1, 0].isfinite().all()
        assert arrived[0, 0].isfinite().all() and arrived[0, 1, 1].isfinite().all()


def test_transitions_travel_bit_for_bit_beside_a_code() -> None:
    states, parameter = torch.randn(3, 1, 5, 3, 3), torch.randn(3, 2, 4)
    parameter[0, 0] = torch.tensor([-torch.inf, torch.nan, 1e-40, -0.0])
    for codec in CODED:
        wire = Wire(codec=codec)
        rows = wire.pack(states, parameter)
        bits = wire.unpack_parameter(rows, states.shape[1:], parameter.shape[1:], torch.float32)
        assert torch.equal(bits.view(torch.int32), parameter.view(torch.int32))
        alone = wire.unpack(wire.pack(states), states.shape[1:], torch.float32)
        assert torch.equal(wire.unpack(rows, states.shape[1:], torch.float32), alone)


def coded_errors(name: str, kind: type[Transition], order: Any, codec: Codec) -> list[float]:
    layout = SequenceLayout(64, order=order, ranks_per_node=2)
    topology = Pipelined(None, 2, codec=codec) if name == "pipelined" else TOPOLOGIES[name](codec=codec)
    return errors_of_scan(topology, kind, (1, 5, 4, 6), layout, torch.float32)


# Passes over the wire of the topologies, of states that are rounded to whole numbers each time.
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"-(ScalarDecay-contiguous|Dense-zigzag)$")
@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
@pytest.mark.parametrize("kind", [ScalarDecay, Dense])
@pytest.mark.parametrize("name", GENERAL)
def test_a_codec_costs_a_few_roundings_and_no_more(name: str, kind: type[Transition], order: str) -> None:
    for codec, limit in ((Int8(8), 0.1), (TopK(1.0), 0.05)):
        results = run_on_ranks(4, coded_errors, name, kind, order, codec)
        assert worst(error for errors in results for error in errors) < limit
        # Something was rounded.
        assert worst(error for errors in results for error in errors) > 2**-12


def bytes_and_formulas(codec: Codec, inside: Codec | None, order: Any) -> list[tuple[str, str, int, int]]:
    """For each topology and direction the bytes that this rank sends, and those of the formula."""
    layout = SequenceLayout(64, order=order, ranks_per_node=2)
    cluster = Cluster(4, 2, Link(1e-5, 1e9), Link(1e-4, 1e8), 1e-5, 1e9, 1e9)
    found = []
    for name in GENERAL:
        kinds = TOPOLOGIES[name]
        options: dict[str, Any] = {"codec": codec}
        if name == "two_level":
            options["codec_inside"] = inside
        topology: Topology = Pipelined(None, 3, **options) if name == "pipelined" else kinds(**options)
        shape = (1, 8, 16, 24)
        cost = topology.cost(Problem.of_states(ScalarDecay, (layout.num_segments, *shape), layout), cluster)
        traffic = traffic_both_ways(topology, shape, layout)
        for phase, formula in (("forward", cost.forward), ("backward", cost.backward)):
            found.append((name, phase, traffic.of_phase(phase).bytes_sent, formula.bytes_sent))
    return found


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^zigzag$")
@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
def test_bytes_are_those_of_the_formulas(order: str) -> None:
    for codec, inside in ((Int8(), Int8()), (Float8(40), None), (TopK(0.1), Int8(64))):
        by_rank = run_on_ranks(4, bytes_and_formulas, codec, inside, order)
        for counted in zip(*by_rank, strict=True):
            name, phase, _, formula = counted[0]
            assert max(sent for _, _, sent, _ in counted) == formula, (name, phase, codec)


def test_int8_takes_little_more_than_a_quarter_of_float32() -> None:
    sizes = {codec: codec_named(codec).format.row_bytes(128 * 128) / (4 * 128 * 128) for codec in CODECS}  # type: ignore[union-attr]
    assert sizes["int8"] == sizes["float8"] == (1 + 4 / 128) / 4
    assert sizes["top_k"] == pytest.approx(0.1, rel=1e-3)


def by_link(order: Any) -> tuple[float, dict[str, int]]:
    """Errors of a chain whose links inside a node send states as they are, and bytes by topology."""
    layout = SequenceLayout(64, order=order, ranks_per_node=2)
    error = worst(
        errors_of_scan(Ring(codec="int8", codec_inside=None), ScalarDecay, (1, 2, 4, 4), layout, torch.float32)
    )
    topologies = {
        "plain": Ring(),
        "coded": Ring(codec="int8"),
        "between": Ring(codec="int8", codec_inside=None),
    }
    traffic = {name: traffic_both_ways(topology, (1, 2, 16, 16), layout) for name, topology in topologies.items()}
    return error, {name: sent.of_phase("forward").bytes_sent for name, sent in traffic.items()}


def test_links_inside_a_node_may_have_a_codec_of_their_own() -> None:
    by_rank = run_on_ranks(4, by_link, "contiguous")
    assert 1e-4 < worst(error for error, _ in by_rank) < 0.1
    plain, coded = 2 * 16 * 16 * 4, 2 * (16 * 16 + 2 * 4)
    # Ranks 0 and 2 send inside a node, rank 1 out of it, and rank 3 nothing.
    assert [sent["between"] for _, sent in by_rank] == [plain, coded, plain, 0]
    assert [sent["coded"] for _, sent in by_rank] == [coded, coded, coded, 0]


def test_error_feedback_sends_later_what_it_has_left_out() -> None:
    states = torch.randn(1, 1, 2, 8, 8, generator=torch.Generator().manual_seed(3))
    total = torch.zeros_like(states)
    feedback = TopK(1 / 64, feedback=True)
    for _ in range(500):
        wire = Wire(codec=feedback)
        total += wire.unpack(wire.pack(states), states.shape[1:], torch.float32)
    # All numbers come through in the mean: what is still left out is a few of their sizes at most.
    assert relative_error(total / 500, states) < 0.12
    without = Wire(codec=TopK(1 / 64))
    once = without.unpack(without.pack(states), states.shape[1:], torch.float32)
    assert relative_error(once, states) > 0.4
    # Another direction, another message and another layer have errors of their own.
    assert isinstance(feedback.feedback, ErrorFeedback)
    fresh = feedback.for_another_layer()
    for wire in (Wire(codec=feedback, phase="backward"), Wire(codec=fresh)):
        assert torch.equal(wire.unpack(wire.pack(states), states.shape[1:], torch.float32), once)
    assert fresh != feedback and TopK(0.1) == TopK(0.1)


def exchanges_of(model: Any) -> list[Any]:
    return [block.mixer.parallel.exchange for block in model.blocks]


def test_layers_of_a_model_do_not_share_their_errors() -> None:
    model = parallelize(tiny_model(pattern="L", num_layers=2), None, exchange=Ring(codec=TopK(0.1, feedback=True)))
    first, second = exchanges_of(model)
    assert first.codec.feedback is not second.codec.feedback
    assert first.codec.fraction == second.codec.fraction == 0.1
    # Of other models all layers have one exchange.
    with pytest.raises(
        InputError, match=r"belongs to one layer; the layers of Linear share one exchange\. Give a codec"
    ):
        parallelize(torch.nn.Linear(2, 2), None, exchange=Ring(codec=TopK(0.1, feedback=True)))
    first, second = exchanges_of(parallelize(tiny_model(pattern="L", num_layers=2), None, exchange=Ring(codec="int8")))
    assert first == second


def outputs_in_turn() -> list[Tensor]:
    """Of a layer whose exchange has feedback, and once without gradients; then of one that was never called without."""
    layout = SequenceLayout(64)
    random = torch.Generator().manual_seed(0)
    q, k, v = (layout.shard(torch.randn(1, 64, 2, 8, generator=random)) for _ in range(3))

    def output(exchange: Any) -> Tensor:
        return longspan.linear_attention(q, k, v, layout=layout, exchange=exchange)

    found = []
    kinds: tuple[Any, ...] = (Ring, Auto)
    for chosen_by in kinds:
        fed, other = (chosen_by(codec=TopK(0.1, feedback=True)) for _ in range(2))
        found += [output(chosen_by(codec=TopK(0.1))), output(fed)]
        with torch.no_grad():
            found.append(output(fed))
        found += [output(fed), output(other), output(other)]
    return found


def test_without_gradients_nothing_is_added_or_remembered() -> None:
    first, last = run_on_ranks(2, outputs_in_turn)
    for outputs in (first[:6], first[6:], last[:6], last[6:]):
        plain, fed, evaluated, fed_again, other, other_again = outputs
        assert torch.equal(plain, fed) and torch.equal(plain, evaluated) and torch.equal(plain, other)
        assert torch.equal(fed_again, other_again)
    # What was left out is added: for the rank that is sent something.
    assert not torch.equal(last[3], last[1]) and not torch.equal(last[9], last[7])


def with_doubles(exchange: Any) -> None:
    layout = SequenceLayout(16)
    x = torch.randn(1, layout.num_local_tokens, 1, 4, dtype=torch.float64)
    longspan.linear_attention(x, x, x, layout=layout, exchange=exchange)


def test_float64_states_are_refused_on_every_rank_alike() -> None:
    for exchange in (Ring(codec="int8"), TwoLevel(codec=TopK(0.5)), Auto(codec="float8"), Auto(max_relative_error=0.1)):
        for kind, message in run_on_ranks(2, raised, with_doubles, exchange):
            assert kind == "InputError"
            assert "takes states of torch.float32; got torch.float64" in message
            given = "the codec" if exchange.codec is not None else "max_relative_error"
            assert message.startswith(given) and f"Leave {given} out, or compute in float32" in message


def with_bound(bound: float) -> None:
    layout = SequenceLayout(16)
    x = torch.randn(1, layout.num_local_tokens, 1, 4)
    longspan.linear_attention(x, x, x, layout=layout, exchange=Auto(max_relative_error=bound))


def test_a_bound_that_nothing_keeps_to_is_refused_on_every_rank_with_the_least_that_is_met() -> None:
    for bound in (0.0, 1e-3, 2**-8 - 1e-6):
        for kind, message in run_on_ranks(2, raised, with_bound, bound):
            assert kind == "InputError"
            assert (
                f"max_relative_error is {bound:g}, and no codec keeps to it: the least that is kept to is 0.00390625, by"
                in message
            )
            assert "Give at least as much" in message
    # As the message has it.
    assert [codec.format.name for codec in codecs_within(0.00390625)] == ["bfloat16"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Ring(codec="zip"),
            r"codec must be None, one of 'int8', 'float8', 'top_k', or a codec with options .* got 'zip'",
        ),
        (
            lambda: Ring(codec=3),  # type: ignore[arg-type]
            r"got 3 \(int\)",
        ),
        (lambda: Ring(torch.bfloat16, codec="int8"), r"takes a state_dtype or a codec .* Leave one of them out"),
        (
            lambda: AllGather(codec="int8", codec_inside=None),
            r"AllGather takes no codec_inside: all its links .* got None \(NoneType\) beside the codec Int8.*Leave it out, or take",
        ),
        (lambda: AllToAll(codec_inside="int8"), r"AllToAll takes no codec_inside.* got Int8.* beside the codec None"),
        (lambda: Int8(0), r"Int8: block must be an int of at least 1.* got 0 \(int\). Leave it out for 128"),
        (lambda: TopK(0), r"TopK: fraction must be a number above 0 and at most 1.* got 0 \(int\). Give 0.1"),
        (lambda: TopK(1.5), r"got 1.5 \(float\)"),
        (
            lambda: Auto(max_relative_error=1e-3),
            r"max_relative_error is 0.001, and no codec keeps to it: the least .* is 0.00390625, by",
        ),
        (lambda: Auto(max_relative_error=-1.0), r"max_relative_error is -1, and no codec keeps to it"),
        (lambda: Auto(max_relative_error=math.nan), r"must be a finite number.* got nan \(float\)"),
        (
            lambda: Auto(max_relative_error="0.1"),  # type: ignore[arg-type]
            r"must be a finite number.* got '0.1' \(str\)",
        ),
        (
            lambda: Auto(torch.bfloat16, max_relative_error=0.1),
            r"one of state_dtype, codec and max_relative_error; got",
        ),
        (lambda: Auto(codec="int8", max_relative_error=0.1), r"Leave out all but one"),
    ],
)
def test_what_does_not_fit_is_refused_when_it_is_written(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_a_bound_allows_what_keeps_to_it() -> None:
    def names(bound: float) -> list[str]:
        return [codec.format.name for codec in codecs_within(bound)]

    assert names(2**-8) == ["bfloat16"]
    assert names(0.02) == ["bfloat16", "int8"]
    assert names(0.07) == ["bfloat16", "int8", "float8"]
    # A larger bound never allows less.
    for bound in (0.9, 1.0, 2.0):
        assert names(bound) == ["bfloat16", "int8", "float8", "top_k"]
    for bound in (0.004, 0.012, 0.03, 0.1, 0.9, 0.99, 2.0):
        for found in codecs_within(bound):
            assert found.format.worst_error <= bound


def chosen(bandwidths: tuple[float, float], bound: float | None) -> tuple[str, str | None, str | None]:
    layout = SequenceLayout(64, ranks_per_node=2)
    cluster = Cluster(4, 2, Link(1e-5, bandwidths[0]), Link(1e-5, bandwidths[1]), 1e-5, 2.5e9, 40e9)
    exchange = Auto(cluster=cluster) if bound is None else Auto(cluster=cluster, max_relative_error=bound)
    topology = exchange.choose(own_decays((1, 16, 64, 64), layout), layout).topology
    assert topology.state_dtype is None
    names = [x.format.name if isinstance(x, Codec) else None for x in (topology.codec, topology.codec_inside)]
    return (topology.name, *names)  # type: ignore[return-value]


def test_the_cost_model_codes_what_goes_over_slow_links() -> None:
    for bandwidths, bound, codecs in (
        # Fast links: coding takes longer than sending.
        ((1e12, 1e12), 0.1, [(None, None)]),
        ((1e12, 1e6), 0.1, [("int8", None), ("float8", None)]),
        ((1e6, 1e6), 0.1, [("int8", "int8"), ("float8", "float8")]),
        ((1e12, 1e4), 0.99, [("top_k", None)]),
        # However slow they are, nothing that was not asked for.
        ((1e4, 1e4), None, [(None, None)]),
    ):
        found = run_on_ranks(4, chosen, bandwidths, bound)
        assert len(set(found)) == 1
        assert found[0][1:] in codecs, (bandwidths, found[0])


def outputs(exchange: Any) -> Tensor:
    layout = SequenceLayout(64)
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 64, 2, 8, generator=random) for _ in range(3))
    g = -0.1 * torch.rand(1, 64, 2, generator=random)
    o = longspan.simple_gla(*(layout.shard(x) for x in (q, k, v, g)), layout=layout, exchange=exchange)
    assert isinstance(o, Tensor)
    return layout.gather(o)


def test_an_operator_takes_a_bound_and_a_codec() -> None:
    for exchange in (Auto(max_relative_error=0.05), Auto(codec="int8"), Auto(codec=Float8(), measure=True)):
        coded, exact = run_on_ranks(2, outputs, exchange)[1], run_on_ranks(2, outputs, "ring")[1]
        assert float((coded - exact).norm() / exact.norm()) < 0.07
