"""Exchanges: equal to the scan with every gradient, one collective each way, bytes by the formula, overlapped both ways."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import longspan
from longspan.errors import InputError
from longspan.exchange import TOPOLOGIES, exchange_named, record_traffic, start_exchange
from longspan.exchange.wire import HEADER_BYTES
from longspan.layout import SequenceLayout
from longspan.state import ChannelDecay, Dense, HeadDecay, Identity, Pair, ScalarDecay, Transition, exclusive_scan
from tests.compare import relative_error, worst
from tests.ranks import run_on_ranks
from tests.unwritten import unwritten_memory_is_nan

KINDS: list[type[Transition]] = [Identity, HeadDecay, ScalarDecay, ChannelDecay, Dense]


def own_rows(layout: SequenceLayout) -> list[int]:
    own = [(s.slot, index) for index, s in enumerate(layout.all_segments) if s.rank == layout.rank]
    return [index for _, index in sorted(own)]


@unwritten_memory_is_nan()
def errors_of_exchange(
    topology: str, kind: type[Transition], order: Any, seq_len: int, documents: list[int] | None
) -> list[float]:
    layout = SequenceLayout(seq_len, order=order, documents=documents)
    num_segments = len(layout.all_segments)
    generator = torch.Generator().manual_seed(0)
    shape = (num_segments, 2, 3, 4, 5)
    states = torch.randn(shape, generator=generator, dtype=torch.float64)
    parameter = -torch.rand(kind.parameter_shape(shape), generator=generator, dtype=torch.float64)
    if kind is Identity:
        parameter.zero_()
    parameter = kind(parameter).cut([segment.starts_document for segment in layout.all_segments]).parameter
    # No token reads what enters a segment whose first token starts a document.
    read = [segment.start not in layout.document_bounds for segment in layout.all_segments]
    grad_in = torch.randn(shape, generator=generator, dtype=torch.float64)
    grad_in[[not is_read for is_read in read]] = 0.0

    all_states, all_parameters = states.clone().requires_grad_(), parameter.clone().requires_grad_()
    expected = exclusive_scan(Pair(kind(all_parameters), all_states))
    expected_grads = torch.autograd.grad((expected * grad_in).sum(), [all_states, all_parameters])

    rows = own_rows(layout)
    own_states = states[rows].requires_grad_()
    own_parameter = parameter if kind.is_known else parameter[rows].requires_grad_()
    incoming = start_exchange(exchange_named(topology), Pair(kind(own_parameter), own_states), layout).wait()
    leaves = [own_states] if kind.is_known else [own_states, own_parameter]
    # A gradient that is not contiguous, as they come from permuted products.
    grad = grad_in[rows].transpose(3, 4).contiguous().transpose(3, 4)
    grads = torch.autograd.grad(incoming, leaves, grad)
    errors = [relative_error(incoming[slot], expected[row]) for slot, row in enumerate(rows) if read[row]]
    errors += [
        # A transition that was cut is a constant, and what enters where nothing reads may be anything.
        relative_error(got[slot], want[row])
        for got, want in zip(grads, expected_grads, strict=False)
        for slot, row in enumerate(rows)
        if got is grads[0] or read[row]
    ]
    return errors


def errors_of_exchanges(
    topology: str, kind: type[Transition], order: Any, cases: list[tuple[int, list[int] | None]]
) -> list[float]:
    return [error for case in cases for error in errors_of_exchange(topology, kind, order, *case)]


# Lengths and documents: one document; boundaries inside segments and, for 3 ranks in zigzag order, on their edge; empty segments;
# and documents that reach no further than the next segment, which is all that `neighbour` is for.
LONG: list[tuple[int, list[int] | None]] = [(40, None), (40, [0, 1, 7, 25, 40]), (9, None)]
SHORT: list[tuple[int, list[int] | None]] = [(40, [0, *range(1, 40, 2), 40]), (40, [*range(0, 41, 2)])]


# Two ranks in the other order, and this order on three.
@pytest.mark.slow_rows(r"-contiguous-2$")
@pytest.mark.slow_rows(
    r"-(ChannelDecay|Identity|Dense)-zigzag-8$", r"-(HeadDecay|Identity)-.*-[348]$", r"-contiguous-8$"
)
# Others of their kind run in make test.
@pytest.mark.slow_rows(
    r"^(all_gather|all_to_all|auto|ring)-ScalarDecay-zigzag-8$",
    r"-(ChannelDecay-contiguous|Dense-zigzag)-3$",
    r"-(ChannelDecay|Dense)-zigzag-2$",
    r"^(two_level|all_to_all|all_gather)-ScalarDecay-(contiguous-3|zigzag-2)$",
)
@pytest.mark.parametrize("num_ranks", [2, 3, pytest.param(4, marks=pytest.mark.slow), 8])
@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("topology", [*TOPOLOGIES, "auto"])
def test_an_exchange_is_the_scan_with_the_gradients_of_states_and_transitions(
    topology: str, kind: type[Transition], order: str, num_ranks: int
) -> None:
    cases = SHORT if topology == "neighbour" else LONG + SHORT
    for errors in run_on_ranks(num_ranks, errors_of_exchanges, topology, kind, order, cases):
        assert worst(errors) < 1e-12


def traffic_of_layer(seq_len: int, order: Any, operator: str) -> dict[str, Any]:
    """What one layer sends, by our recorder and by what torch.distributed was really asked for."""
    asked: list[tuple[str, int]] = []

    def spy(name: str, original: Any) -> Any:
        def collective(*args: Any, **kwargs: Any) -> Any:
            asked.append((name, sum(x.numel() * x.element_size() for x in args[1:2] if isinstance(x, Tensor))))
            return original(*args, **kwargs)

        return collective

    names = ["all_gather_into_tensor", "all_gather_single", "all_gather", "all_reduce", "all_to_all_single"]
    names += ["broadcast", "reduce_scatter_single", "reduce_scatter_tensor", "send", "isend", "recv", "irecv"]
    originals = {name: getattr(dist, name) for name in names if hasattr(dist, name)}
    layout = SequenceLayout(seq_len, order=order)
    q, k, v = (torch.randn(1, layout.num_local_tokens, 2, size, requires_grad=True) for size in (4, 4, 6))
    gates: Any = {"g": -torch.rand(1, layout.num_local_tokens, 2)} if operator == "simple_gla" else {}
    try:
        for name, original in originals.items():
            setattr(dist, name, spy(name, original))
        with record_traffic() as traffic:
            o = longspan.write(operator, k, v, **gates, layout=layout, exchange="all_gather").read(q)
            after_forward = len(asked)
            o.backward(torch.randn_like(o))
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return {
        "forward": traffic.count("forward"),
        "backward": traffic.count("backward"),
        "bytes": [event.bytes_sent for event in traffic.events],
        "asked_forward": [name for name, _ in asked[:after_forward]],
        "asked_backward": [name for name, _ in asked[after_forward:]],
        "asked_bytes": [size for _, size in asked],
        "waited": traffic.wait_seconds,
    }


@pytest.mark.parametrize(("operator", "numbers_of_transition"), [("linear_attention", 0), ("simple_gla", 2)])
@pytest.mark.parametrize(("order", "num_segments"), [("contiguous", 1), ("zigzag", 2)])
def test_a_layer_makes_one_all_gather_each_way_and_its_bytes_do_not_grow_with_the_sequence(
    order: str, num_segments: int, operator: str, numbers_of_transition: int
) -> None:
    num_ranks, state = 3, 2 * 4 * 6
    for seq_len in (30, 3000):
        for traffic in run_on_ranks(num_ranks, traffic_of_layer, seq_len, order, operator):
            assert (traffic["forward"], traffic["backward"]) == (1, 1)
            assert len(traffic["asked_forward"]) == len(traffic["asked_backward"]) == 1
            assert all(name.startswith("all_gather") for name in traffic["asked_forward"] + traffic["asked_backward"])
            expected = [num_segments * (state + numbers_of_transition) * 4, num_segments * state * 4]
            assert traffic["asked_bytes"] == [size + num_segments * HEADER_BYTES for size in expected]
            assert traffic["bytes"] == [(num_ranks - 1) * size for size in expected]
            assert traffic["waited"] > 0


def test_one_rank_makes_no_collective() -> None:
    (traffic,) = run_on_ranks(1, traffic_of_layer, 30, "zigzag", "simple_gla")
    assert traffic["asked_forward"] == traffic["asked_backward"] == []


class Noted(torch.autograd.Function):
    """An identity that writes down when it runs forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str, log: list[str]) -> Tensor:
        ctx.name, ctx.log = name, log
        log.append(f"{name} forward")
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ctx.log.append(f"{ctx.name} backward")
        return grads[0], None, None


class NotedWork:
    """A collective's work that writes down when it is waited for."""

    def __init__(self, work: Any, name: str, log: list[str]) -> None:
        self.work, self.name, self.log = work, name, log

    def wait(self) -> None:
        self.log.append(f"{self.name} waited for")
        self.work.wait()


def order_of_events(overlapped: bool) -> list[str]:
    from longspan.exchange.topologies import all_gather

    log: list[str] = []
    original = all_gather._gather

    def noted_gather(local: Tensor, layout: SequenceLayout, phase: str) -> tuple[Tensor, Any]:
        log.append(f"{phase} exchange launched")
        out, work = original(local, layout, phase)
        return out, NotedWork(work, f"{phase} exchange", log)

    layout = SequenceLayout(64)
    x = torch.randn(1, layout.num_local_tokens, 8, dtype=torch.float64, requires_grad=True)
    g = -torch.rand(1, layout.num_local_tokens, 2, dtype=torch.float64)
    all_gather._gather = noted_gather
    try:
        kv = Noted.apply(x, "keys and values", log).view(1, -1, 2, 4)
        memory = longspan.write("simple_gla", kv, kv * 2, g=g, layout=layout, exchange="all_gather")
        q = Noted.apply(x, "queries", log).view(1, -1, 2, 4)
        o = memory.read_overlapped(q) if overlapped else memory.read(q)
        Noted.apply(o, "output", log).sum().backward()
    finally:
        all_gather._gather = original
    return log


@pytest.mark.parametrize("overlapped", [False, True])
def test_what_stands_between_write_and_read_hides_the_exchange_in_both_directions(overlapped: bool) -> None:
    expected = [
        "keys and values forward",
        "forward exchange launched",
        "queries forward",
        "forward exchange waited for",
        "output forward",
        "output backward",
        "backward exchange launched",
        "queries backward",
        "backward exchange waited for",
        "keys and values backward",
    ]
    *others, last = run_on_ranks(4, order_of_events, overlapped)
    for log in others:
        assert log == expected
    # Nothing comes after the last rank, so that no gradient can come from there.
    assert last == [event for event in expected if event != "backward exchange waited for"]


def test_an_unknown_topology_is_refused_with_the_list_of_known_ones() -> None:
    with pytest.raises(InputError, match="'auto', one of 'all_gather'"):
        exchange_named("telepathy")
