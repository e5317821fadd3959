"""What softmax attention computes, sends and keeps over ranks: no more than the masks leave, and hidden behind computation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longspan.attention.softmax import SoftmaxMethod, choice, ring, softmax_attention, write_softmax
from longspan.attention.softmax.all_gather import gather_plan
from longspan.attention.softmax.attention import SoftmaxMemory
from longspan.attention.softmax.ring import journeys, ring_plan
from longspan.comm.all_to_all import Flight
from longspan.comm.traffic import Event
from longspan.exchange import record_traffic
from longspan.layout import Order, SequenceLayout
from longspan.layout.visibility import Visibility, length
from longspan.ops.softmax import merge as tiles
from tests.attention.softmax_reference import Documents, random_inputs
from tests.compare import relative_error
from tests.ranks import run_on_ranks

METHODS: tuple[SoftmaxMethod, ...] = ("all_gather", "ring", "ulysses")
ORDERS: tuple[Order, ...] = ("contiguous", "zigzag")
DIM = 8
TOKEN = 2 * DIM * 8
"""Bytes of a token's key and value: one head of DIM, float64."""


def events_of(options: dict[str, Any], layout_options: dict[str, Any]) -> dict[str, list[Event]]:
    """What this rank sends in a layer of 24 tokens, one row, 6 heads and one key head, by phase."""
    q, k, v, grad = random_inputs(16, 1, 24, 6, 1, DIM)
    layout = SequenceLayout(24, **layout_options)
    leaves = [layout.shard(x).clone().requires_grad_() for x in (q, k, v)]
    with record_traffic() as traffic:
        softmax_attention(leaves[0], leaves[1], leaves[2], layout=layout, **options).backward(layout.shard(grad))
    return {phase: [x for x in traffic.events if x.phase == phase] for phase in ("forward", "backward")}


def sent(num_ranks: int, phase: str, method: SoftmaxMethod, **options: Any) -> list[int]:
    """Bytes that each rank sends, in tokens' keys and values."""
    layout_options = {name: options.pop(name) for name in ("order", "documents") if name in options}
    answers = run_on_ranks(num_ranks, events_of, {"method": method, **options}, layout_options)
    tokens = []
    for events in answers:
        num_tokens, rest = divmod(sum(event.bytes_sent for event in events[phase]), TOKEN)
        assert rest == 0
        tokens.append(num_tokens)
    return tokens


@pytest.mark.parametrize("order", ORDERS)
def test_all_gather_takes_one_collective_each_way(order: Order) -> None:
    for events in run_on_ranks(3, events_of, {"method": "all_gather"}, {"order": order}):
        assert [event.name for event in events["forward"]] == ["all_gather"]
        assert [event.name for event in events["backward"]] == ["all_to_all"]


def test_all_gather_returns_no_gradient_that_the_causal_mask_makes_zero() -> None:
    assert sent(3, "forward", "all_gather") == [16, 16, 16]
    assert sent(3, "backward", "all_gather") == [0, 8, 16]
    # Segments of 4 tokens: rank r sees those before 2P-1-r, and sends those that are not its own.
    assert sent(3, "backward", "all_gather", order="zigzag") == [16, 12, 8]


def test_all_gather_brings_only_the_tokens_that_a_window_or_documents_leave() -> None:
    assert sent(3, "forward", "all_gather", window=4) == [3, 3, 0]
    assert sent(3, "backward", "all_gather", window=4) == [0, 3, 3]
    assert sent(3, "forward", "all_gather", documents=[0, 6, 10, 24]) == [2, 6, 0]
    # The third and fourth segments of zigzag are on one rank: nothing is sent for what they see of each other.
    assert sent(3, "forward", "all_gather", window=4, order="zigzag") == [3, 6, 3]


def test_all_gather_and_all_to_all_are_chosen_alike_on_every_rank() -> None:
    for window in (None, 2, 8, 9, 12, 17, 24):
        visibility = Visibility((0, 24), True, window)
        for order in ORDERS:
            layouts = [SequenceLayout.for_rank(24, 3, rank, order) for rank in range(3)]
            assert len({gather_plan(layout, visibility).gathers for layout in layouts}) == 1


def test_a_causal_ring_stops_at_the_last_rank() -> None:
    # Keys of rank 0 go to ranks 1 and 2, those of rank 1 to rank 2, those of rank 2 nowhere.
    assert sent(3, "forward", "ring") == [8, 16, 0]
    # The same keys, and their gradients: 0 -> 1 -> 2 -> home, and 1 -> 2 -> home.
    assert sent(3, "backward", "ring") == [8, 24, 16]


def test_a_bidirectional_ring_goes_all_the_way() -> None:
    assert sent(3, "forward", "ring", causal=False) == [16, 16, 16]
    assert sent(3, "backward", "ring", causal=False) == [32, 32, 32]


def test_a_ring_sends_only_the_tokens_that_a_window_or_documents_leave() -> None:
    assert sent(3, "forward", "ring", window=4) == [3, 3, 0]
    assert sent(3, "backward", "ring", window=4) == [3, 6, 3]
    assert sent(3, "forward", "ring", documents=[0, 6, 10, 24]) == [2, 6, 0]
    # A window that reaches two ranks back: the second hop carries what is seen there.
    assert sent(3, "forward", "ring", window=12) == [8, 8 + 3, 0]


def test_the_second_segment_of_zigzag_travels_no_further_than_it_is_seen() -> None:
    # Segments of 4 tokens. The first one of each rank is seen by every rank, the second one of rank s by ranks before s.
    causal = Visibility((0, 24), True, None)
    ways = journeys(SequenceLayout.for_rank(24, 3, 0, "zigzag"), causal)
    assert [[length(runs) for runs in way.keys] for way in ways] == [[4, 4], [8, 8], [8, 8]]
    assert [[length(runs) for runs in way.grads] for way in ways] == [[4, 4], [4, 8], [8, 8]]
    assert [[length(runs) for runs in way.seen] for way in ways] == [[4, 4], [4, 8], [8, 8]]


def test_a_ring_counts_a_message_for_each_tensor_that_leaves() -> None:
    for rank, events in enumerate(run_on_ranks(3, events_of, {"method": "ring"}, {})):
        assert [event.num_messages for event in events["forward"]] == [[1, 0], [1, 1], [0, 0]][rank]


def test_keys_and_gradients_travel_while_a_rank_computes() -> None:
    """Each round's keys leave before the blocks of the round before, each sum of gradients before the blocks of the next."""
    want = [
        (
            ["keys", "block", "wait", "keys", "wait"],
            ["keys", "block", "wait", "keys", "grads", "wait", "wait", "grads", "wait"],
        ),
        (
            ["keys", "block", "wait", "keys", "block", "wait"],
            ["keys", "block", "wait", "keys", "block", "grads", "wait", "wait", "grads", "wait"],
        ),
        (
            ["keys", "block", "wait", "keys", "block", "wait", "block"],
            ["keys", "block", "wait", "keys", "block", "grads", "wait", "block", "wait", "grads", "wait"],
        ),
    ]
    assert run_on_ranks(3, order_of_ring) == want


def order_of_ring() -> tuple[list[str], list[str]]:
    """Sends of keys and of gradients, waits and blocks of this rank, in order, forward and backward."""
    events: list[str] = []
    modules: list[tuple[Any, str, str]] = [
        (ring.RingKeys, "_send", "keys"),
        (ring._Grads, "pass_on", "grads"),
        (Flight, "wait", "wait"),
        (tiles, "block_forward", "block"),
        (tiles, "block_backward", "block"),
    ]
    originals = [getattr(module, name) for module, name, _ in modules]

    def recorded(event: str, original: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            result = original(*args, **options)
            events.append(event)
            return result

        return call

    try:
        for (module, name, event), original in zip(modules, originals, strict=True):
            setattr(module, name, recorded(event, original))
        q, k, v, grad = random_inputs(13, 1, 48, 2, 1, 8)
        layout = SequenceLayout(48)
        leaves = [layout.shard(x).clone().requires_grad_() for x in (q, k, v)]
        out = softmax_attention(leaves[0], leaves[1], leaves[2], layout=layout, method="ring")
        forward = list(events)
        events.clear()
        out.backward(layout.shard(grad))
    finally:
        for (module, name, _), original in zip(modules, originals, strict=True):
            setattr(module, name, original)
    return forward, events


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_zigzag_gives_every_rank_the_same_pairs_in_every_round(num_ranks: int) -> None:
    causal = Visibility((0, 64), True, None)
    plans = [ring_plan(SequenceLayout.for_rank(64, num_ranks, rank, "zigzag"), causal) for rank in range(num_ranks)]
    for number in range(num_ranks - 1):
        pairs = {sum(block.num_pairs for block in plan.rounds[number].blocks) for plan in plans}
        assert pairs == {(64 // num_ranks) ** 2 // 2}


def test_ulysses_sends_the_same_whatever_is_masked() -> None:
    # 8 tokens per rank. Keys of one head to two ranks; queries, outputs and both gradients of two heads of DIM to two ranks.
    keys, queries = 2 * 8, 2 * 8 * 2 // 2
    for options in ({}, {"causal": False}, {"window": 4}, {"order": "zigzag"}):
        assert sent(3, "forward", "ulysses", **options) == [keys + 2 * queries] * 3
        assert sent(3, "backward", "ulysses", **options) == [keys + 2 * queries] * 3


def bytes_with_values_of_another_size(method: SoftmaxMethod) -> list[int]:
    q, k, v, grad = random_inputs(16, 1, 24, 6, 1, 6, value_dim=4)
    layout = SequenceLayout(24)
    leaves = [layout.shard(x).clone().requires_grad_() for x in (q, k, v)]
    with record_traffic() as traffic:
        softmax_attention(leaves[0], leaves[1], leaves[2], layout=layout, method=method).backward(layout.shard(grad))
    return [sum(x.bytes_sent for x in traffic.events if x.phase == phase) for phase in ("forward", "backward")]


def test_values_of_another_size_travel_without_padding() -> None:
    """As docs/softmax.md has it: a key of 6 numbers and a value of 4, in float64."""
    token = (6 + 4) * 8
    answers = {method: run_on_ranks(3, bytes_with_values_of_another_size, method) for method in METHODS}
    assert answers["all_gather"] == [[16 * token, tokens * token] for tokens in (0, 8, 16)]
    assert answers["ring"] == [[8 * token, 8 * token], [16 * token, 24 * token], [0, 16 * token]]
    assert answers["ulysses"] == [[2 * 8 * (1 + 2) * token] * 2] * 3


@pytest.mark.parametrize("method", METHODS)
def test_no_collective_where_no_rank_needs_another(method: SoftmaxMethod) -> None:
    nothing: dict[str, list[Event]] = {"forward": [], "backward": []}
    assert run_on_ranks(1, events_of, {"method": method}, {}) == [nothing]
    assert run_on_ranks(3, events_of, {"method": method}, {"documents": [0, 5, 8, 16, 24]}) == [nothing] * 3
    assert run_on_ranks(3, events_of, {"method": method, "window": 1}, {}) == [nothing] * 3


def order_of_events(method: SoftmaxMethod) -> list[str]:
    """What happens in forward and backward when the query projection stands between write and read."""
    events: list[str] = []

    class Projection(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            events.append("query projection")
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            events.append("query projection's backward")
            return grads[0].clone()

    exchange: Any = choice.METHODS[method]
    names = ("start", "attend_first", "attend_rest", "backward", "finish")
    originals = {name: getattr(exchange, name) for name in names}

    def recorded(name: str) -> Any:
        def call(*args: Any) -> Any:
            events.append(name)
            return originals[name](*args)

        return call

    try:
        for name in names:
            setattr(exchange, name, recorded(name))
        q, k, v, grad = random_inputs(11, 1, 24, 4, 2, 8)
        layout = SequenceLayout(24)
        leaves = [layout.shard(x).clone().requires_grad_() for x in (q, k, v)]
        written = write_softmax(leaves[1], leaves[2], layout=layout, method=method)
        written.read(Projection.apply(leaves[0])).backward(layout.shard(grad))
    finally:
        for name in names:
            setattr(exchange, name, originals[name])
    return events


@pytest.mark.parametrize("method", METHODS)
def test_the_query_projection_hides_the_exchange_and_its_backward_the_return(method: SoftmaxMethod) -> None:
    for events in run_on_ranks(2, order_of_events, method):
        assert events == [
            "start",
            "query projection",
            "attend_first",
            "attend_rest",
            "backward",
            "query projection's backward",
            "finish",
        ]


class LargestTensor(TorchDispatchMode):
    """Number of elements of the largest tensor that any operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.num_elements = max(self.num_elements, tensor.numel())
        return result


def largest_tensors(method: SoftmaxMethod) -> list[tuple[str, int]]:
    tokens = 1200
    found = []
    for order in ORDERS:
        for causal, window, documents in MASKS:
            layout = SequenceLayout(tokens, order=order, documents=documents)
            q, k, v, grad = (layout.shard(x).clone() for x in random_inputs(12, 1, tokens, 2, 1, 8))
            leaves = [x.requires_grad_() for x in (q, k, v)]
            with LargestTensor() as largest:
                softmax_attention(
                    leaves[0], leaves[1], leaves[2], layout=layout, causal=causal, window=window, method=method
                ).backward(grad)
            found.append((f"{order} {causal} {window} {documents}", largest.num_elements))
    return found


MASKS: list[tuple[bool, int | None, Documents]] = [
    (True, None, None),
    (False, None, None),
    (True, None, (0, 500, 1200)),
    (False, None, (0, 500, 1200)),
    (True, 100, None),
    (False, 100, None),
    (True, 700, (0, 500, 1200)),
]


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^ulysses$")
@pytest.mark.parametrize("method", METHODS)
def test_no_tensor_has_the_size_of_a_mask(method: SoftmaxMethod) -> None:
    tokens, num_ranks = 1200, 2
    packed_keys_and_values = tokens * 2 * 8
    for rank in run_on_ranks(num_ranks, largest_tensors, method):
        for setting, elements in rank:
            # Twice: a band of grouped blocks copies what its squares share.
            assert elements <= 2 * packed_keys_and_values < tokens // num_ranks * tokens, (setting, elements)


def computed_blocks(order: Order, causal: bool, documents: Documents) -> tuple[list[Any], list[Any]]:
    """(queries, keys, causal) of each kernel call of this rank, forward and backward."""
    forward: list[Any] = []
    backward: list[Any] = []
    block_forward, block_backward = tiles.block_forward, tiles.block_backward

    def recorded_forward(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        forward.append((q.shape[1], k.shape[1], options["causal"]))
        return block_forward(q, k, v, **options)

    def recorded_backward(grad: Tensor, q: Tensor, k: Tensor, *rest: Any, **options: Any) -> Any:
        backward.append((q.shape[1], k.shape[1], options["causal"]))
        return block_backward(grad, q, k, *rest, **options)

    module: Any = tiles
    try:
        module.block_forward, module.block_backward = recorded_forward, recorded_backward
        layout = SequenceLayout(48, order=order, documents=documents)
        q, k, v, grad = (layout.shard(x).clone() for x in random_inputs(13, 1, 48, 2, 1, 8))
        softmax_attention(q.requires_grad_(), k, v, layout=layout, causal=causal, method="all_gather").backward(grad)
    finally:
        module.block_forward, module.block_backward = block_forward, block_backward
    return sorted(forward), sorted(backward)


def test_only_blocks_with_visible_keys_are_computed() -> None:
    cases: list[tuple[Order, bool, Documents, list[list[tuple[int, int, bool]]]]] = [
        (
            "contiguous",
            True,
            None,
            [[(16, 16, True)], [(16, 16, False), (16, 16, True)], [(16, 16, True), (16, 32, False)]],
        ),
        (
            "zigzag",
            True,
            None,
            [
                [(16, 16, True), (8, 32, False)],
                [(16, 16, True), (16, 8, False), (8, 16, False)],
                [(16, 16, True), (16, 16, False)],
            ],
        ),
        (
            "contiguous",
            True,
            (0, 20, 32, 48),
            [[(16, 16, True)], [(4, 4, True), (4, 16, False), (12, 12, True)], [(16, 16, True)]],
        ),
        ("contiguous", False, None, [[(16, 16, False), (16, 32, False)]] * 3),
        ("zigzag", False, None, [[(16, 16, False), (16, 32, False)]] * 3),
        (
            "contiguous",
            False,
            (0, 20, 32, 48),
            [
                [(16, 4, False), (16, 16, False)],
                [(4, 4, False), (4, 16, False), (12, 12, False)],
                [(16, 16, False)],
            ],
        ),
    ]
    for order, causal, documents, want in cases:
        for rank, (forward, backward) in enumerate(run_on_ranks(3, computed_blocks, order, causal, documents)):
            assert forward == sorted(want[rank]), (order, causal, documents, rank)
            assert backward == sorted(want[rank])


def test_one_device_is_one_call_of_pytorchs_own_kernel() -> None:
    forward, backward = computed_blocks("contiguous", True, None)
    assert forward == backward == [(48, 48, True)]


def kept_for_backward(method: SoftmaxMethod) -> int:
    """Numbers that the nodes keep, of 64 tokens, 4 heads and 2 key heads of 8, and no row twice."""
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes() // x.element_size()
        return x

    layout = SequenceLayout(64, order="zigzag")
    q, k, v, _ = (layout.shard(x).clone().requires_grad_() for x in random_inputs(1, 1, 64, 4, 2, 8))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = softmax_attention(q, k, v, layout=layout, method=method)
    assert out.requires_grad
    return sum(kept.values())


def test_what_a_rank_keeps_for_backward_is_what_the_formulas_say() -> None:
    """As docs/softmax.md has it: q, k, v, o and log-sum-exp of the rank's own tokens, or of its own heads, and gathered keys."""
    own = 16 * (2 * 4 * 8 + 2 * 2 * 8 + 4)
    assert run_on_ranks(4, kept_for_backward, "ring") == [own] * 4
    # Segments of 8 tokens: rank r needs the 7 - r segments before its second one, but its own first.
    gathered = [8 * (6 - rank) * 2 * 2 * 8 for rank in range(4)]
    assert run_on_ranks(4, kept_for_backward, "all_gather") == [own + more for more in gathered]
    # One of four query heads, and its key head: key heads are two, so each is kept by two ranks. The output of the rank's own
    # tokens, which the page counts too, is not kept by the layer itself.
    heads = 64 * (2 * 8 + 2 * 8 + 1)
    assert run_on_ranks(4, kept_for_backward, "ulysses") == [heads] * 4


def read_after_backward(method: SoftmaxMethod) -> tuple[float, int]:
    layout = SequenceLayout(64, order="zigzag")
    q, k, v, grad = (layout.shard(x).clone().requires_grad_() for x in random_inputs(1, 1, 64, 4, 2, 8))
    memory = write_softmax(k, v, layout=layout, method=method, num_heads=4)
    assert isinstance(memory, SoftmaxMemory)
    out = memory.read(q)
    out.backward(grad.detach())
    tensors = [x for x in vars(memory._reader._exchange).values() if isinstance(x, Tensor | tuple | Flight)]
    again = memory.read(q)
    return relative_error(again, out), len(tensors)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_held_after_backward_and_a_later_read_exchanges_anew(method: SoftmaxMethod) -> None:
    assert run_on_ranks(2, read_after_backward, method) == [(0.0, 0)] * 2
