"""Halos: each segment gets the tokens before it, from whoever holds them, with every gradient, and no message more."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from longspan.comm.all_to_all import Flight
from longspan.errors import LayoutError
from longspan.exchange import halo, record_traffic
from longspan.exchange.halo import Fetch, PendingHalo, halo_plan, start_halo
from longspan.layout import Order, SequenceLayout
from tests.compare import relative_error, worst
from tests.exchange.test_exchange import Noted, NotedWork
from tests.ranks import run_on_ranks
from tests.unwritten import unwritten_memory_is_nan

ORDERS: list[Order] = ["contiguous", "zigzag"]
Documents = list[int] | None


def documents_of(seq_len: int) -> list[Documents]:
    """None; and boundaries on shards and inside them, with one-token documents."""
    return [None, sorted({0, 1, 2, seq_len // 4, seq_len // 2, seq_len // 2 + 1, seq_len - 1, seq_len})]


def halo_positions(layout: SequenceLayout, start: int, width: int) -> list[int | None]:
    """The definition: global positions of the halo's slots of a segment, None where it has no token."""
    document = max(bound for bound in layout.document_bounds[:-1] if bound <= start)
    return [position if position >= document else None for position in range(start - width, start)]


def positions_of_run(fetch: Fetch, layouts: list[SequenceLayout]) -> list[int]:
    return layouts[fetch.source_rank].positions[fetch.source_start : fetch.source_stop].tolist()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 5])
def test_plans_of_all_ranks_fill_every_halo_by_its_definition(num_ranks: int, order: Order) -> None:
    for seq_len in (num_ranks, num_ranks + 2, 9, 2 * num_ranks + 1, 40, 61):
        for documents in documents_of(seq_len) if seq_len > 3 else [None]:
            layouts = [SequenceLayout.for_rank(seq_len, num_ranks, rank, order, documents) for rank in range(num_ranks)]
            for width in (1, 3, 6, 15):
                for layout in layouts:
                    check_plan(layout, layouts, width)


def check_plan(layout: SequenceLayout, layouts: list[SequenceLayout], width: int) -> None:
    plan = halo_plan(layout, width)
    got: list[list[int | None]] = [[None] * width for _ in layout.segments]
    for fetch in [*plan.copies, *(fetch for fetches in plan.receives.values() for fetch in fetches)]:
        assert fetch.rank == layout.rank
        assert got[fetch.segment][fetch.start : fetch.stop] == [None] * fetch.num_tokens, "a slot is filled twice"
        got[fetch.segment][fetch.start : fetch.stop] = positions_of_run(fetch, layouts)
    for (start, stop), slots in zip(layout.segments, got, strict=True):
        assert slots == (halo_positions(layout, start, width) if start < stop else [None] * width)
    assert layout.rank not in plan.receives and all(fetch.source_rank == layout.rank for fetch in plan.copies)
    for peer, fetches in plan.receives.items():
        assert halo_plan(layouts[peer], width).sends[layout.rank] == fetches
    for peer, fetches in plan.sends.items():
        assert halo_plan(layouts[peer], width).receives[layout.rank] == fetches
    assert plan.exchanges == any(halo_plan(other, width).receives for other in layouts)
    assert plan.is_empty == (not plan.exchanges and not plan.copies)


def test_the_last_rank_of_a_zigzag_copies_from_itself_and_sends_itself_nothing() -> None:
    plan = halo_plan(SequenceLayout.for_rank(64, 4, 3, "zigzag"), 3)
    assert [(fetch.source_start, fetch.source_stop) for fetch in plan.copies] == [(5, 8)]
    assert set(plan.sends) == set(plan.receives) == {2}


def test_documents_that_end_with_shards_need_no_messages() -> None:
    for rank in range(4):
        assert halo_plan(SequenceLayout.for_rank(64, 4, rank, documents=[0, 16, 32, 48, 64]), 3).is_empty


def errors_of_halos(order: Order, widths: list[int], dtype: torch.dtype) -> float:
    """Largest error of the halos and of the gradient of x, over lengths, documents and widths, on this rank."""
    errors: list[float] = []
    for seq_len in (4, 9, 41):
        for documents in documents_of(seq_len):
            for width in widths:
                errors += errors_of_halo(SequenceLayout(seq_len, order=order, documents=documents), width, dtype)
    return worst(errors)


@unwritten_memory_is_nan()
def errors_of_halo(layout: SequenceLayout, width: int, dtype: torch.dtype) -> list[float]:
    generator = torch.Generator().manual_seed(layout.seq_len)

    def integers(*shape: int) -> Tensor:
        # Small integers: sums are exact in every dtype.
        return torch.randint(-8, 9, shape, generator=generator).to(dtype)

    x = integers(2, layout.seq_len, 3)
    grad_x = integers(2, layout.seq_len, 3)
    expected_grad = grad_x.clone()
    expected, grads = [], []
    for segment in layout.all_segments:
        tokens, grad = torch.zeros(2, width, 3, dtype=dtype), integers(2, width, 3)
        for slot, position in enumerate(halo_positions(layout, segment.start, width)):
            if position is not None and segment.num_tokens:
                tokens[:, slot] = x[:, position]
                expected_grad[:, position] += grad[:, slot]
        if segment.rank == layout.rank:
            expected.append((segment.slot, tokens))
            grads.append((segment.slot, grad))
    local = layout.shard(x).clone().requires_grad_()
    pending = start_halo(local, layout, width)
    got = pending.wait()
    # A halo's gradient comes from a permuted product, and is not contiguous.
    grad_halo = torch.stack([grad for _, grad in sorted(grads, key=lambda pair: pair[0])])
    grad_halo = grad_halo.transpose(1, 2).contiguous().transpose(1, 2)
    upstream = layout.shard(grad_x).clone()
    (got_grad,) = torch.autograd.grad((pending.x, got), local, (upstream, grad_halo))
    assert got.dtype == got_grad.dtype == dtype
    assert torch.equal(upstream, layout.shard(grad_x)), "a gradient of the caller's was written to"
    want = torch.stack([tokens for _, tokens in sorted(expected, key=lambda pair: pair[0])])
    return [relative_error(got, want), relative_error(got_grad, layout.shard(expected_grad))]


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^(contiguous-4|zigzag-2)$")
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("order", ORDERS)
def test_every_rank_gets_its_halos_and_the_gradients_of_the_tokens_that_it_gave(order: Order, num_ranks: int) -> None:
    assert run_on_ranks(num_ranks, errors_of_halos, order, [1, 3, 6], torch.float64) == [0.0] * num_ranks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_halos_travel_in_the_dtype_of_the_tokens(dtype: torch.dtype) -> None:
    for order in ORDERS:
        assert run_on_ranks(3, errors_of_halos, order, [3], dtype) == [0.0] * 3


def errors_in_subgroups() -> float:
    """Ranks 0 and 2 hold one sequence, ranks 1 and 3 another."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    group = groups[dist.get_rank() % 2]
    try:
        return worst(errors_of_halo(SequenceLayout(23 + dist.get_rank() % 2, group, "zigzag"), 3, torch.float64))
    finally:
        dist.barrier()
        dist.destroy_process_group(group)


def test_halos_stay_in_their_group() -> None:
    assert run_on_ranks(4, errors_in_subgroups) == [0.0] * 4


@unwritten_memory_is_nan()
def several_in_flight() -> float:
    """Three halos of different widths and channels, started one after another and waited for in another order."""
    layout = SequenceLayout(24, order="zigzag")
    x = [torch.randn(1, 24, size, generator=torch.Generator().manual_seed(size)) for size in (2, 3, 5)]
    local = [layout.shard(each).requires_grad_() for each in x]
    pending = [start_halo(each, layout, width) for each, width in zip(local, (3, 1, 6), strict=True)]
    halos: dict[int, Tensor] = {index: pending[index].wait() for index in (1, 2, 0)}
    total = torch.stack([(halos[index] * (index + 1)).sum() for index in (2, 0, 1)]).sum()
    grads = torch.autograd.grad(total, local)
    errors = []
    for index, width in enumerate((3, 1, 6)):
        expected_grad = torch.zeros_like(x[index])
        for start, tokens in zip([s for s, _ in layout.segments], halos[index], strict=True):
            for slot, position in enumerate(halo_positions(layout, start, width)):
                want = torch.zeros_like(tokens[:, slot]) if position is None else x[index][:, position]
                errors.append(relative_error(tokens[:, slot], want))
        for segment in layout.all_segments:
            for position in halo_positions(layout, segment.start, width):
                if position is not None:
                    expected_grad[:, position] += index + 1
        errors.append(relative_error(grads[index], layout.shard(expected_grad)))
    return worst(errors)


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_halos_in_flight_together_do_not_mix(num_ranks: int) -> None:
    assert run_on_ranks(num_ranks, several_in_flight) == [0.0] * num_ranks


def traffic_of_halo(seq_len: int, order: Order, documents: Documents, width: int) -> dict[str, Any]:
    """What our recorder says, and what torch.distributed was asked for: tokens to and from each rank."""
    asked: list[tuple[list[int], list[int]]] = []
    original = dist.all_to_all_single

    def spy(*args: Any, **options: Any) -> Any:
        _, sent, receive_sizes, send_sizes = args
        assert tuple(sent.shape) == (sum(send_sizes), 2, 5)
        asked.append((send_sizes, receive_sizes))
        return original(*args, **options)

    layout = SequenceLayout(seq_len, order=order, documents=documents)
    x = torch.randn(2, layout.num_local_tokens, 5, requires_grad=True)
    dist.all_to_all_single = spy
    try:
        with record_traffic() as traffic:
            pending = start_halo(x, layout, width)
            halos = pending.wait()
            assert len(asked) <= 1
            (pending.x.sum() + halos.sum()).backward()
    finally:
        dist.all_to_all_single = original
    return {
        "events": [(event.name, event.phase, event.bytes_sent) for event in traffic.events],
        "asked": asked,
        "waited": traffic.wait_seconds,
    }


BYTES_OF_TOKEN = 2 * 5 * 4


def check_messages(traffic: list[dict[str, Any]], sent: list[list[int]]) -> None:
    """sent: for each rank, the tokens that it sends to each; backward the same messages go the other way."""
    received = [list(column) for column in zip(*sent, strict=True)]
    for rank, seen in enumerate(traffic):
        assert seen["asked"] == [(sent[rank], received[rank]), (received[rank], sent[rank])]
        num_bytes = [sum(tokens[rank]) * BYTES_OF_TOKEN for tokens in (sent, received)]
        assert seen["events"] == [("halo", "forward", num_bytes[0]), ("halo", "backward", num_bytes[1])]
        assert seen["waited"] > 0


@pytest.mark.parametrize("seq_len", [40, 4000])
def test_a_segments_halo_goes_to_its_owner_alone_and_its_gradient_back(seq_len: int) -> None:
    sent = [[0, 3, 0, 0], [0, 0, 3, 0], [0, 0, 0, 3], [0, 0, 0, 0]]
    check_messages(run_on_ranks(4, traffic_of_halo, seq_len, "contiguous", None, 3), sent)


def test_a_zigzag_sends_to_both_neighbours_and_nothing_to_itself() -> None:
    sent = [[0, 3, 0, 0], [3, 0, 3, 0], [0, 3, 0, 3], [0, 0, 3, 0]]
    check_messages(run_on_ranks(4, traffic_of_halo, 80, "zigzag", None, 3), sent)


def test_a_halo_longer_than_a_segment_comes_from_several() -> None:
    sent = [[0, 2, 2, 1], [0, 0, 2, 2], [0, 0, 0, 2], [0, 0, 0, 0]]
    check_messages(run_on_ranks(4, traffic_of_halo, 8, "contiguous", None, 5), sent)


def test_what_a_document_boundary_makes_useless_is_not_sent() -> None:
    # Ranks hold 10 tokens each. Rank 1 starts inside a document that is one token old, rank 2 starts one, rank 3 is inside.
    sent = [[0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 3], [0, 0, 0, 0]]
    check_messages(run_on_ranks(4, traffic_of_halo, 40, "contiguous", [0, 9, 20, 25, 40], 3), sent)


@pytest.mark.parametrize(("num_ranks", "documents"), [(1, None), (1, [0, 3, 40]), (4, [0, 10, 20, 30, 40])])
def test_one_rank_or_no_token_to_send_makes_no_message(num_ranks: int, documents: Documents) -> None:
    for traffic in run_on_ranks(num_ranks, traffic_of_halo, 40, "contiguous", documents, 3):
        assert traffic["asked"] == traffic["events"] == []


HIDDEN_HALO = [
    "tokens forward",
    "forward halo launched",
    "inside forward",
    "forward halo waited for",
    "output forward",
    "output backward",
    "backward halo launched",
    "inside backward",
    "backward halo waited for",
    "tokens backward",
]
"""Events in their order where what stands between start and wait hides the halo, forward and backward."""


def order_of_events() -> list[str]:
    log: list[str] = []
    original = halo.start_all_to_all

    def noted_start(*args: Any, **options: Any) -> Flight:
        log.append(f"{args[-1]} halo launched")
        flight = original(*args, **options)
        return replace(flight, work=NotedWork(flight.work, f"{args[-1]} halo", log))

    layout = SequenceLayout(64)
    x = torch.randn(1, layout.num_local_tokens, 8, dtype=torch.float64, requires_grad=True)
    halo.start_all_to_all = noted_start
    try:
        tokens = Noted.apply(x, "tokens", log)
        pending: PendingHalo = start_halo(tokens, layout, 3)
        inside = Noted.apply(pending.x, "inside", log)
        # A halo of zeros enters the result as well: the gradients of the tokens that were sent come back through it.
        out = inside + pending.wait().sum()
        Noted.apply(out, "output", log).square().sum().backward()
    finally:
        halo.start_all_to_all = original
    return log


def test_what_stands_between_start_and_wait_hides_the_halo_in_both_directions() -> None:
    for log in run_on_ranks(4, order_of_events):
        assert log == HIDDEN_HALO


def test_a_layout_for_planning_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"made by for_rank\(\)"):
        start_halo(torch.zeros(1, 4, 2), SequenceLayout.for_rank(8, 2, 0), 3)
