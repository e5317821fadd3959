"""Ring, pipelined and neighbour: who sends what to whom, that ranks do not run one after another, and when neighbour holds."""

from __future__ import annotations

import random
import threading
from collections import deque
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist

import longspan
from longspan.comm import point_to_point
from longspan.comm.groups import new_group_beside
from longspan.comm.point_to_point import Mailbox, Receipt
from longspan.errors import InputError, LayoutError
from longspan.exchange import (
    TOPOLOGIES,
    Neighbour,
    Pipelined,
    Ring,
    record_traffic,
    start_exchange,
)
from longspan.exchange.chain import Chain, Passage, chain_of, order_of
from longspan.exchange.topologies.neighbour import only_neighbours_meet
from longspan.layout import SequenceLayout, group_of
from longspan.ops.variants import VARIANTS
from longspan.state import Dense, HeadDecay, Identity, Pair, ScalarDecay, Transition, exclusive_scan
from tests.compare import relative_error, worst
from tests.exchange.test_exchange import own_rows
from tests.ranks import raised, run_on_ranks

SHAPE = (2, 3, 4, 7)  # B, H, K, V
STATE = 2 * 3 * 4 * 7


def pair_of(kind: type[Transition], layout: SequenceLayout, dtype: torch.dtype = torch.float64) -> tuple[Pair, Pair]:
    """Pairs of all segments, and of this rank's as `start_exchange` takes them."""
    segments = layout.all_segments
    generator = torch.Generator().manual_seed(1)
    shape = (len(segments), *SHAPE)
    states = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    parameter = -torch.rand(kind.parameter_shape(shape), generator=generator, dtype=torch.float64).to(dtype)
    transition = kind(parameter * 0 if kind is Identity else parameter).cut([s.starts_document for s in segments])
    rows = own_rows(layout)
    own = transition if kind.is_known else kind(transition.parameter[rows])
    return Pair(transition, states), Pair(own, states[rows])


def messages_each_way(exchange: Any, order: Any, documents: list[int] | None) -> list[list[tuple[str, int, int]]]:
    layout = SequenceLayout(40, order=order, documents=documents)
    _, own = pair_of(ScalarDecay, layout)
    state = own.state.requires_grad_()
    with record_traffic() as traffic:
        incoming = start_exchange(exchange, Pair(own.transition, state), layout).wait()
        torch.autograd.grad(incoming, [state], torch.ones_like(incoming))
        # What a rank sends and does not wait for has been counted when all have what they were sent.
        drain(layout)
    return [
        [(event.name, event.bytes_sent, event.num_messages) for event in traffic.of_phase(phase).events]
        for phase in ("forward", "backward")
    ]


def drain(layout: SequenceLayout) -> None:
    """Wait until this rank's works are done."""
    from longspan.comm.background import run_beside

    run_beside(group_of(layout), torch.device("cpu"), lambda group: None, "messages").wait()


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("name", ["ring", "pipelined"])
def test_a_rank_sends_its_state_once_each_way_but_at_the_ends_and_the_turn(name: str, num_ranks: int) -> None:
    blocks = 3 if name == "pipelined" else None
    message = [(name, STATE * 8, 1)]
    if blocks is not None:
        message = [(name, 2 * 3 * 4 * columns * 8, 1) for columns in (2, 2, 3)]
    exchange = Ring() if blocks is None else Pipelined(num_blocks=blocks)
    last = num_ranks - 1
    for rank, (forward, backward) in enumerate(
        run_on_ranks(num_ranks, messages_each_way, exchange, "contiguous", None)
    ):
        assert forward == ([] if rank == last else message)
        assert backward == ([] if rank == 0 else message)
    for rank, (forward, backward) in enumerate(run_on_ranks(num_ranks, messages_each_way, exchange, "zigzag", None)):
        times = 1 if rank in (0, last) else 2
        # Blocks of a rank's two segments may alternate.
        assert sorted(forward) == sorted(times * message)
        assert sorted(backward) == sorted(times * message)


def test_no_message_passes_the_start_of_a_document() -> None:
    # Segments of 10: the second and the last one begin with a document.
    for name in ("ring", "pipelined", "neighbour"):
        results = run_on_ranks(4, messages_each_way, TOPOLOGIES[name](), "contiguous", [0, 10, 25, 30, 40])
        assert [len(forward) > 0 for forward, _ in results] == [False, True, False, False]
        assert [len(backward) > 0 for _, backward in results] == [False, False, True, False]


def test_bfloat16_halves_the_bytes_of_float32_and_quarters_those_of_float64() -> None:
    for name in ("ring", "pipelined", "neighbour"):
        documents = [0, 15, 25, 35, 40]
        exchange = TOPOLOGIES[name](torch.bfloat16)
        for forward, backward in run_on_ranks(4, messages_each_way, exchange, "contiguous", documents):
            for events in (forward, backward):
                assert sum(size for _, size, _ in events) in (0, STATE * 2)


def results_in_bfloat16(name: str) -> list[float]:
    layout = SequenceLayout(40, documents=[0, 15, 25, 35, 40])
    everyone, own = pair_of(ScalarDecay, layout, torch.float32)
    incoming = start_exchange(TOPOLOGIES[name](torch.bfloat16), own, layout).wait()
    expected = exclusive_scan(everyone)[own_rows(layout)]
    exact = start_exchange(TOPOLOGIES[name](), own, layout).wait()
    errors = [relative_error(x, expected) for x in (incoming, exact)]
    return [*errors, float(incoming.dtype == torch.float32)]


@pytest.mark.parametrize("name", ["ring", "pipelined", "neighbour"])
def test_states_rounded_for_the_wire_differ_by_their_rounding(name: str) -> None:
    results = run_on_ranks(4, results_in_bfloat16, name)
    assert all(rounded < 2**-8 and exact < 1e-6 and is_float32 for rounded, exact, is_float32 in results)
    assert worst(rounded for rounded, _, _ in results) > 2**-12


def blocks_of(num_blocks: int | None) -> list[Any]:
    layout = SequenceLayout(40)
    everyone, own = pair_of(Dense, layout)
    with record_traffic() as traffic:
        incoming = start_exchange(Pipelined(num_blocks=num_blocks), own, layout).wait()
        drain(layout)
    error = relative_error(incoming, exclusive_scan(everyone)[own_rows(layout)])
    return [traffic.num_messages, traffic.bytes_sent, error]


@pytest.mark.parametrize(("asked", "expected"), [(1, 1), (3, 3), (7, 7), (1000, 7)])
def test_a_state_has_as_many_blocks_as_asked_for_but_no_more_than_value_columns(asked: int, expected: int) -> None:
    results = run_on_ranks(3, blocks_of, asked)
    assert [traffic for *traffic, _ in results] == [[expected, STATE * 8], [expected, STATE * 8], [0, 0]]
    assert all(error < 1e-12 for *_, error in results)


def test_the_number_of_blocks_that_the_cost_model_chooses_is_the_same_on_every_rank() -> None:
    *senders, _ = run_on_ranks(4, blocks_of, None)
    assert len({num_messages for num_messages, _, _ in senders}) == 1
    assert 1 <= senders[0][0] <= 7


def order_of_sends(name: str, documents: list[int] | None, phase: str) -> list[str]:
    """What this rank does for one exchange while its main thread waits for its worker's last step, and not for the exchange."""
    layout, log, done = SequenceLayout(40, documents=documents), [], threading.Event()
    original = point_to_point.Mailbox

    class Noted(original):  # type: ignore[valid-type, misc]
        def send(self, *args: Any) -> None:
            log.append("sends")
            super().send(*args)

        def wait(self, *args: Any) -> Any:
            arrived = super().wait(*args)
            log.append("has received")
            return arrived

        def close(self) -> None:
            super().close()
            done.set()

    from longspan.exchange import chain

    chain.Mailbox = Noted  # type: ignore[misc]
    try:
        _, own = pair_of(ScalarDecay, layout)
        topology = TOPOLOGIES[name]().resolve(own, layout)
        pending: Any
        if phase == "forward":
            pending = topology.start(own, layout)
        else:
            pending = topology.start_reverse(ScalarDecay, (own.transition.parameter,), own.state, layout)
        assert done.wait(30)
        log.append("main thread waits")
        pending.wait()
    finally:
        chain.Mailbox = original  # type: ignore[misc]
    return log


def travelled(by_rank: list[list[str]], phase: str) -> list[list[str]]:
    """Ranks in the order in which the state passes them."""
    return by_rank if phase == "forward" else by_rank[::-1]


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_the_state_goes_through_all_ranks_while_no_main_thread_waits_for_it(phase: str) -> None:
    first, *middle, last = travelled(run_on_ranks(4, order_of_sends, "ring", None, phase), phase)
    assert first == ["sends", "main thread waits"]
    assert middle == [["has received", "sends", "main thread waits"]] * 2
    assert last == ["has received", "main thread waits"]


@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize("name", ["ring", "neighbour"])
def test_a_segment_in_which_a_document_starts_sends_without_waiting_for_what_enters_it(name: str, phase: str) -> None:
    first, *middle, last = travelled(run_on_ranks(4, order_of_sends, name, [0, 15, 25, 35, 40], phase), phase)
    assert first == ["sends", "main thread waits"]
    assert middle == [["sends", "has received", "main thread waits"]] * 2
    assert last == ["has received", "main thread waits"]


def exchanges_without_waiting(num_exchanges: int) -> float:
    """Many exchanges started before the first is waited for."""
    layout = SequenceLayout(40, order="zigzag")
    everyone, own = pair_of(ScalarDecay, layout)
    expected = exclusive_scan(everyone)[own_rows(layout)]
    factors = [float(number + 1) for number in range(num_exchanges)]
    pending = [start_exchange(Ring(), Pair(own.transition, own.state * factor), layout) for factor in factors]
    return worst(
        relative_error(exchange.wait(), expected * factor) for exchange, factor in zip(pending, factors, strict=True)
    )


def test_exchanges_under_way_do_not_mix_and_may_be_more_than_a_rank_sends_ahead() -> None:
    assert worst(run_on_ranks(3, exchanges_without_waiting, 4 * point_to_point.MAX_EXCHANGES_AHEAD)) < 1e-11


def layouts_of(seq_len: int, num_ranks: int, order: Any, documents: list[int] | None) -> list[SequenceLayout]:
    return [SequenceLayout.for_rank(seq_len, num_ranks, rank, order, documents) for rank in range(num_ranks)]


@pytest.mark.parametrize(
    ("num_ranks", "order", "documents", "holds"),
    [
        (2, "contiguous", None, True),
        (3, "contiguous", None, False),
        (4, "contiguous", [0, 15, 25, 35, 40], True),
        (4, "contiguous", [0, 20, 40], True),
        # Over ranks 0, 1 and 2: from token 9 to token 20, inside rank 2.
        (4, "contiguous", [0, 9, 21, 40], False),
        (4, "contiguous", [0, 10, 30, 40], True),
        (4, "contiguous", [0, 9, 20, 40], True),
        # Segments of 10, held by ranks 0, 1, 1, 0: the middle two need no message, but hand on what they receive.
        (2, "zigzag", None, False),
        (2, "zigzag", [0, 10, 40], True),
        (2, "zigzag", [0, 9, 40], False),
        (2, "zigzag", [0, 25, 40], True),
    ],
)
def test_neighbour_holds_where_no_document_passes_through_a_third_rank(
    num_ranks: int, order: str, documents: list[int] | None, holds: bool
) -> None:
    for layout in layouts_of(40, num_ranks, order, documents):
        _, own = pair_of(ScalarDecay, layout)
        assert only_neighbours_meet(own, layout) is holds


@pytest.mark.parametrize(("log_decay", "holds"), [(-120.0, True), (-100.0, False)])
def test_neighbour_holds_for_decays_that_are_zero_over_a_segment_in_float32(log_decay: float, holds: bool) -> None:
    for layout in layouts_of(40, 4, "contiguous", None):
        parameter = torch.tensor([[log_decay, -1e4]]).expand(4, 2)
        assert only_neighbours_meet(Pair(HeadDecay(parameter), torch.zeros(1, 1, 2, 3, 3)), layout) is holds
        # The same decay is far from zero in float64.
        assert not only_neighbours_meet(
            Pair(HeadDecay(parameter.double()), torch.zeros(1, 1, 2, 3, 3).double()), layout
        )


def test_documents_and_decays_cut_the_chain_together() -> None:
    # Rank 1's segment forgets; in that of rank 2, which does not, a document starts.
    parameter = torch.tensor([[0.0], [-1e4], [0.0], [0.0]])
    for layout in layouts_of(40, 4, "contiguous", [0, 25, 40]):
        transition = HeadDecay(parameter).cut([s.starts_document for s in layout.all_segments])
        assert only_neighbours_meet(Pair(transition, torch.zeros(1, 1, 1, 3, 3)), layout)
        assert not only_neighbours_meet(Pair(ScalarDecay(torch.zeros(1, 1, 1)), torch.zeros(1, 1, 1, 3, 3)), layout)


def refused_neighbour() -> list[Any]:
    layout = SequenceLayout(40)
    _, own = pair_of(ScalarDecay, layout)
    with record_traffic() as traffic:
        error = raised(start_exchange, Neighbour(), own, layout)
    return [error, traffic.num_collectives]


def test_neighbour_is_refused_on_every_rank_before_any_message_with_the_way_out() -> None:
    for (name, message), num_collectives in run_on_ranks(3, refused_neighbour):
        assert name == LayoutError.__name__
        assert "no document spans more than two ranks" in message and "exchange='auto'" in message
        assert num_collectives == 0


def neighbour_of_a_decay(order: Any) -> list[float]:
    """`retention` by neighbour and by all_gather, with decays that forget within every segment, and their gradients."""
    seq_len = 48
    layout = SequenceLayout(seq_len, order=order)
    generator = torch.Generator().manual_seed(3)
    whole = [torch.randn(1, seq_len, 2, size, generator=generator, dtype=torch.float64) for size in (3, 3, 5, 5)]
    decay = torch.tensor([-200.0, -1000.0], dtype=torch.float64)
    results = []
    for exchange in ("neighbour", "all_gather"):
        q, k, v = (layout.shard(x).requires_grad_() for x in whole[:3])
        o = longspan.retention(q, k, v, decay, layout=layout, exchange=exchange)
        results.append([o, *torch.autograd.grad(o, [q, k, v], layout.shard(whole[3]))])
    return [relative_error(got, want) for got, want in zip(*results, strict=True)]


@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
def test_decays_that_forget_need_their_neighbour_alone(order: str) -> None:
    for errors in run_on_ranks(4, neighbour_of_a_decay, order):
        assert worst(errors) < 1e-12


@pytest.mark.parametrize(("log_decay", "holds"), [((-20.0, -11.0), True), ((-20.0, -1.0), False), (None, False)])
def test_of_decays_on_another_device_the_numbers_that_the_host_has_decide(
    log_decay: tuple[float, ...] | None, holds: bool
) -> None:
    # A tensor on this device has no values: reading one would fail.
    layout = SequenceLayout.for_rank(40, 4, 0)
    pair = Pair(HeadDecay(torch.empty(4, 2, device="meta"), log_decay), torch.zeros(1, 1, 2, 3, 3))
    assert only_neighbours_meet(pair, layout) is holds


def test_the_operators_decay_reaches_the_exchange_with_its_numbers() -> None:
    log_decay = torch.tensor([-0.25, -0.5])
    k, v = torch.randn(1, 10, 2, 3), torch.randn(1, 10, 2, 4)
    form = VARIANTS["retention"].prepare(k, v, {"log_decay": log_decay}, SequenceLayout.local(10), None, "torch")
    transition = form.transition([(0, 6), (6, 10)]).cut([True, False])
    assert isinstance(transition, HeadDecay) and transition.log_decay == (-0.25, -0.5)


def test_a_constant_comes_as_numbers_or_as_a_tensor() -> None:
    q, k, v = (torch.randn(1, 10, 2, 3) for _ in range(3))
    numbers = [-0.25, -0.5]
    for causal in (True, False):
        memories = [
            longspan.write("retention", k, v, log_decay=x, causal=causal) for x in (numbers, torch.tensor(numbers))
        ]
        assert torch.equal(*(memory.read(q) for memory in memories))
    with pytest.raises(InputError, match="log_decay must be numbers"):
        longspan.write("retention", k, v, log_decay=["fast", "slow"])  # type: ignore[list-item]


@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
@pytest.mark.parametrize("documents", [None, [0, 1, 9, 10, 30, 40], [*range(0, 41, 2)]])
@pytest.mark.parametrize("seq_len", [40, 5])
def test_every_sender_has_its_receiver_in_both_directions(
    order: Any, documents: list[int] | None, seq_len: int
) -> None:
    if seq_len == 5:
        documents = None if documents is None else [0, 2, 5]
    layout = SequenceLayout.for_rank(seq_len, 4, 0, order, documents)
    links: list[set[tuple[tuple[int, int], tuple[int, int]]]] = []
    for reverse in (False, True):
        runs = chain_of(layout, reverse)
        assert sorted((run.rank, row) for run in runs for row in run.rows) == sorted(
            (segment.rank, segment.slot) for segment in layout.all_segments
        )
        for earlier, later in pairwise(runs):
            assert (earlier.target is None) == (later.source is None)
            assert later.source in (None, earlier.rank) and earlier.target in (None, later.rank)
        ends = [
            ((earlier.rank, earlier.rows[-1]), (later.rank, later.rows[0]))
            for earlier, later in pairwise(runs)
            if later.source is not None
        ]
        links.append({(b, a) for a, b in ends} if reverse else set(ends))
    assert links[0] == links[1]


def test_a_layout_whose_segments_begin_with_documents_makes_no_exchange_at_all() -> None:
    results = run_on_ranks(4, messages_each_way, Ring(), "contiguous", [0, 10, 20, 30, 40])
    assert results == [[[], []]] * 4


def subgroup_exchange() -> float:
    # Two groups at once, in which ranks have other numbers than in the world.
    world = dist.group.WORLD
    assert world is not None
    group = new_group_beside(world, [0, 2] if dist.get_rank() in (0, 2) else [1, 3])
    layout = SequenceLayout(40, group, order="zigzag")
    everyone, own = pair_of(ScalarDecay, layout)
    incoming = start_exchange(Ring(), own, layout).wait()
    return relative_error(incoming, exclusive_scan(everyone)[own_rows(layout)])


def test_groups_of_some_ranks_exchange_among_themselves() -> None:
    assert worst(run_on_ranks(4, subgroup_exchange)) < 1e-12


class Network:
    """Ranks that are threads, and messages between two of them matched in order: what NCCL does, at its strictest."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.sent: dict[tuple[int, int], deque[list[Any]]] = {}
        self.expected: dict[tuple[int, int], deque[list[Any]]] = {}

    def match(self, way: tuple[int, int]) -> None:
        sent, expected = self.sent.setdefault(way, deque()), self.expected.setdefault(way, deque())
        while sent and expected:
            message, receive = sent.popleft(), expected.popleft()
            receive[0].copy_(message[0])
            message[1] = receive[1] = True


class BatchMailbox(Mailbox):
    """Batches that run one after another; a send is done when it has been received."""

    def __init__(self, network: Network, rank: int) -> None:
        self.network, self.rank = network, rank
        self.batch: list[tuple[bool, tuple[int, int], list[Any]]] = []

    def receive(self, buffer: torch.Tensor, source: int, tag: int) -> Receipt:
        self.batch.append((False, (source, self.rank), [buffer, False]))
        return Receipt(buffer)

    def send(self, x: torch.Tensor, target: int, tag: int) -> None:
        self.batch.append((True, (self.rank, target), [x, False]))

    def flush(self) -> None:
        batch, self.batch = self.batch, []
        with self.network.changed:
            for is_send, way, message in batch:
                waiting = self.network.sent if is_send else self.network.expected
                waiting.setdefault(way, deque()).append(message)
                self.network.match(way)
            self.network.changed.notify_all()
            if not self.network.changed.wait_for(lambda: all(message[1] for _, _, message in batch), timeout=20):
                raise TimeoutError(f"rank {self.rank} waits forever")

    def wait(self, receipt: Receipt) -> torch.Tensor:
        return receipt.buffer

    def close(self) -> None:
        self.flush()


def carried_in_batches(layouts: list[SequenceLayout], num_blocks: int, reverse: bool, pair: Pair) -> torch.Tensor:
    """What enters each segment, in global order, when every rank's messages go in batches."""
    network = Network()
    runs = chain_of(layouts[0], reverse)
    incoming, errors = torch.zeros_like(pair.state), []

    def rank_thread(layout: SequenceLayout) -> None:
        rows = own_rows(layout)
        transition = type(pair.transition)(pair.transition.parameter[rows])
        passage = Passage(
            Chain("ring", num_blocks=num_blocks), pair.state[rows], transition, BatchMailbox(network, layout.rank)
        )
        try:
            own = [run for run in runs if run.rank == layout.rank]
            incoming[rows] = passage.carry(own, order_of(runs, layout, in_batches=True))
        except TimeoutError as error:
            errors.append(error)

    threads = [threading.Thread(target=rank_thread, args=(layout,), daemon=True) for layout in layouts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return incoming


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^(False-contiguous|True-zigzag)$")
@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
@pytest.mark.parametrize("reverse", [False, True])
def test_messages_in_batches_that_run_one_after_another_never_wait_in_a_circle(order: Any, reverse: bool) -> None:
    rng = random.Random(0)
    for num_ranks in (2, 3, 4, 6):
        for num_blocks in (1, 2, 5):
            for num_cuts in (0, 1, 3, 20):
                documents = [0, *sorted(rng.sample(range(1, 40), num_cuts)), 40]
                layouts = layouts_of(40, num_ranks, order, documents)
                pair, _ = pair_of(ScalarDecay, layouts[0])
                if reverse:
                    # No gradient comes from where nothing reads.
                    pair.state[[segment.start in documents for segment in layouts[0].all_segments]] = 0.0
                    flipped = Pair(ScalarDecay(pair.transition.parameter.flip(0)), pair.state.flip(0))
                    expected = exclusive_scan(flipped).flip(0)
                else:
                    expected = exclusive_scan(pair)
                got = carried_in_batches(layouts, num_blocks, reverse, pair)
                for index, (segment, later) in enumerate(
                    zip(layouts[0].all_segments, [*layouts[0].all_segments[1:], None], strict=True)
                ):
                    boundary = segment if not reverse else later
                    if boundary is None or boundary.start in documents:
                        assert got[index].count_nonzero() == 0
                    else:
                        assert relative_error(got[index], expected[index]) < 1e-12
