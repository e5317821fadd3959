"""Softmax attention stretch by stretch, earlier keys staying on their ranks, equals dense attention over the whole sequence."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import longspan
from longspan.attention.softmax import EarlierKeys, SoftmaxMethod, softmax_attention
from longspan.attention.softmax.host_memory import Fetched, HostMemory
from longspan.errors import InputError, LayoutError
from longspan.exchange import record_traffic
from longspan.exchange.recomputation import keeping_exchanges
from longspan.layout import ORDERS, Order, SequenceLayout
from tests.attention.softmax_reference import dense_attention, random_inputs
from tests.attention.test_softmax_exchange import LargestTensor
from tests.compare import relative_error, worst
from tests.ranks import run_on_ranks
from tests.unwritten import unwritten_memory_is_nan

METHODS: tuple[SoftmaxMethod, ...] = ("all_gather", "ring", "ulysses")
SCALE = 0.4
CUTS = (0, 8, 20, 25, 44)
PACKED = (0, 2, 8, 9, 10, 30, 44)


@dataclass(frozen=True)
class Case:
    """A sequence in stretches. orders: of the stretches, in turn.

    way: "graph", all in one graph; "by hand", one stretch's graph at a time, from the last to the first; "whole", as "graph" with
    states that every rank has whole.
    """

    method: SoftmaxMethod
    way: str
    cuts: tuple[int, ...] = CUTS
    documents: tuple[int, ...] | None = None
    orders: tuple[Order, ...] = ORDERS
    window: int | None = None
    heads: tuple[int, int] = (4, 2)
    value_dim: int = 4
    softcap: float | None = None
    with_sinks: bool = False
    offload: bool = False
    dtype: torch.dtype = torch.float64
    rows: int = 1


Parts = Sequence[tuple[slice, SequenceLayout]]


def stretches(case: Case) -> list[tuple[slice, SequenceLayout]]:
    wholes = [SequenceLayout(case.cuts[-1], order=x, documents=case.documents, continues=0) for x in case.orders]
    return [(slice(*cut), wholes[number % len(wholes)].stretch(*cut)) for number, cut in enumerate(pairwise(case.cuts))]


def sharded(x: Tensor, parts: Parts) -> list[Tensor]:
    return [layout.shard(x[:, tokens]) for tokens, layout in parts]


@unwritten_memory_is_nan()
def compare(cases: list[Case]) -> list[dict[str, float]]:
    return [_compare(case, seed) for seed, case in enumerate(cases)]


def _compare(case: Case, seed: int) -> dict[str, float]:
    everything = random_inputs(seed, case.rows, case.cuts[-1], *case.heads, 4, case.dtype, case.value_dim)
    sinks = torch.linspace(-1.0, 3.0, case.heads[0], dtype=torch.float64).to(case.dtype)
    leaves = [x.double().clone().requires_grad_() for x in (*everything[:3], sinks)]
    o = dense_attention(
        leaves[0], leaves[1], leaves[2], causal=True, documents=case.documents or (0, case.cuts[-1]), scale=SCALE,
        window=case.window, softcap=case.softcap, sinks=leaves[3] if case.with_sinks else None,
    )  # fmt: skip
    want_grads = torch.autograd.grad(o, leaves, everything[3].double(), allow_unused=True, materialize_grads=True)

    parts = stretches(case)
    q, k, v = ([x.clone().requires_grad_() for x in sharded(y, parts)] for y in everything[:3])
    upstream = sharded(everything[3], parts)
    sinks.requires_grad_()
    run = by_hand if case.way == "by hand" else in_one_graph
    outputs = run(case, parts, q, k, v, sinks if case.with_sinks else None, upstream)
    found: dict[str, tuple[Sequence[Tensor | None], Tensor]] = {"o": (outputs, o)}
    found |= {
        f"d {name}": ([leaf.grad for leaf in own], want_grads[number])
        for number, (name, own) in enumerate(zip("qkv", (q, k, v), strict=True))
    }
    errors: dict[str, float] = {}
    for name, (got, want) in found.items():
        for x, y in zip(got, sharded(want, parts), strict=True):
            assert x is not None and x.dtype == case.dtype
            errors[name] = worst([errors.get(name, 0.0), relative_error(x, y, 1e-2)])
    if case.with_sinks:
        assert sinks.grad is not None
        total = sinks.grad.double()
        dist.all_reduce(total)
        errors["d sinks"] = relative_error(total, want_grads[3])
    return errors


def options_of(case: Case, sinks: Tensor | None) -> dict[str, Any]:
    return {"scale": SCALE, "window": case.window, "softcap": case.softcap, "sinks": sinks, "method": case.method}


def in_one_graph(
    case: Case,
    parts: Parts,
    q: list[Tensor],
    k: list[Tensor],
    v: list[Tensor],
    sinks: Tensor | None,
    upstream: list[Tensor],
) -> list[Tensor]:
    earlier, state, outputs = EarlierKeys(offload=case.offload), None, []
    for number, (_, layout) in enumerate(parts):
        own, options = (q[number], k[number], v[number]), {"layout": layout, **options_of(case, sinks)}
        if case.way == "whole":
            o, state = softmax_attention(*own, initial_state=state, output_final_state=True, **options)
        else:
            o = softmax_attention(*own, earlier=earlier, **options)
            earlier = earlier.followed_by(k[number], v[number], layout, window=case.window)
        outputs.append(o)
    torch.autograd.backward(outputs, upstream)
    return outputs


def by_hand(
    case: Case,
    parts: Parts,
    q: list[Tensor],
    k: list[Tensor],
    v: list[Tensor],
    sinks: Tensor | None,
    upstream: list[Tensor],
) -> list[Tensor]:
    """Keys and values are made of leaves in each stretch's graph, so that gradients pass through `EarlierKeys.last`."""
    entering, outputs = [EarlierKeys(offload=case.offload, requires_grad=True)], []
    options = options_of(case, sinks)
    with torch.no_grad():
        for number, (_, layout) in enumerate(parts):
            own = q[number], k[number] * 1.0, v[number] * 1.0
            outputs.append(softmax_attention(*own, earlier=entering[-1], layout=layout, **options))
            entering.append(entering[-1].followed_by(own[1], own[2], layout, window=case.window))
    for number, (_, layout) in reversed(list(enumerate(parts))):
        own = q[number], k[number] * 1.0, v[number] * 1.0
        again = softmax_attention(*own, earlier=entering[number], layout=layout, **options)
        assert torch.equal(again, outputs[number])
        new = entering[number].followed_by(own[1], own[2], layout, window=case.window).last
        kept = entering[number + 1].last
        tensors, grads = [again], [upstream[number]]
        if new is not None and kept is not None:
            tensors, grads = [*tensors, new.k, new.v], [*grads, *kept.grads()]
        torch.autograd.backward(tensors, grads)
        entering.pop()
    return outputs


def check(num_ranks: int, cases: list[Case], tolerance: float = 1e-10) -> None:
    for rank, answers in enumerate(run_on_ranks(num_ranks, compare, cases)):
        for case, errors in zip(cases, answers, strict=True):
            assert worst(errors) <= tolerance, (rank, case, errors)


RANKS = [2, *(pytest.param(number, marks=pytest.mark.slow) for number in (1, 3, 4))]


@pytest.mark.slow_rows(r"^ulysses-2$")
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^all_gather-2$")
@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize("method", METHODS)
def test_stretches_equal_one_call(num_ranks: int, method: SoftmaxMethod) -> None:
    heads = (12, 4) if num_ranks == 3 else (4, 2)
    cases = [
        Case(method, way, cuts, documents, orders, window, heads)
        for way, (cuts, documents), (orders, window) in product(
            ("graph", "by hand", "whole"),
            [(CUTS, None), (CUTS, PACKED), ((0, 13, 17, 44), (0, 17, 20, 44))],
            [(ORDERS, None), (ORDERS, 7), (ORDERS[:1], 15), (ORDERS[1:], 1)],
        )
    ]
    check(num_ranks, cases)


@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", METHODS)
def test_stretches_equal_one_call_with_every_option(num_ranks: int, method: SoftmaxMethod) -> None:
    cases = [
        Case(method, way, documents=PACKED, window=9, softcap=3.0, with_sinks=True, value_dim=7, offload=offload)
        for way, offload in (("graph", True), ("by hand", False), ("by hand", True), ("whole", False))
    ]
    cases += [
        Case(method, "by hand", heads=(4, 1), rows=2, offload=True),
        Case(method, "graph", heads=(4, 4), rows=2, value_dim=2),
        Case(method, "by hand", (0, *range(2, 44, 3), 44), PACKED, window=11, with_sinks=True),
    ]
    check(num_ranks, cases)


@pytest.mark.slow_rows(r"^(ulysses|ring)$")
@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_does_not_drift_with_the_number_of_stretches(method: SoftmaxMethod) -> None:
    """Keys of the first stretch get gradients from all later ones: of 2 or of 22, they are as far from float64."""
    cases = [Case(method, "by hand", cuts, dtype=torch.bfloat16) for cuts in ((0, 22, 44), tuple(range(0, 45, 2)))]
    check(2, cases, 2e-2)


def keys_and_values(
    num_tokens: int,
    seed: int = 0,
    layout: SequenceLayout | None = None,
    *,
    num_heads: int = 2,
    dtype: torch.dtype = torch.float64,
    takes_gradient: bool = False,
) -> tuple[Tensor, Tensor]:
    """Keys and values of one row, of this rank's tokens."""
    _, k, v, _ = random_inputs(seed, 1, num_tokens, num_heads, num_heads, 4, dtype)
    k, v = (k, v) if layout is None else (layout.shard(k), layout.shard(v))
    return k.requires_grad_(takes_gradient), v.requires_grad_(takes_gradient)


def test_a_further_stretch_shares_the_parts_of_those_before() -> None:
    first = EarlierKeys().followed_by(*keys_and_values(8))
    second = first.followed_by(*keys_and_values(5))
    assert [part.k.shape[1] for part in second.parts] == [8, 5]
    assert second.parts[0] is first.parts[0]
    assert (first.num_tokens, second.num_tokens, second.num_bytes) == (8, 13, 13 * 2 * 8 * 8)


def test_outside_a_graph_keys_are_copied_from_what_they_were_taken_from() -> None:
    k, v = keys_and_values(8)
    earlier = EarlierKeys().followed_by(k[:, :4], v[:, :4])
    kept = [part.k.clone() for part in earlier.parts]
    k.zero_()
    assert torch.equal(earlier.parts[0].k, kept[0])
    assert earlier.parts[0].k.untyped_storage().nbytes() == 4 * 2 * 4 * 8


@pytest.mark.parametrize(
    ("window", "documents", "sizes"),
    [
        (None, None, [[6], [6, 6], [6, 6, 6], [6, 6, 6, 6]]),
        # The last four tokens; a part stays whole while one of its tokens is seen.
        (5, None, [[4], [4], [4], [4]]),
        (9, None, [[6], [6, 6], [6, 6], [6, 6]]),
        (1, None, [[], [], [], []]),
        # A document that begins inside a stretch, and one that begins with one.
        (None, (0, 8, 24), [[6], [4], [4, 6], [4, 6, 6]]),
        (None, (0, 12, 24), [[6], [6, 6], [6], [6, 6]]),
        (3, (0, 11, 24), [[2], [1], [2], [2]]),
    ],
)
def test_what_no_later_token_sees_is_left_out(window: int | None, documents: Any, sizes: list[list[int]]) -> None:
    whole = SequenceLayout.local(24, documents)
    earlier, found = EarlierKeys(), []
    for start in range(0, 24, 6):
        earlier = earlier.followed_by(*keys_and_values(6), whole.stretch(start, start + 6), window=window)
        found.append([part.k.shape[1] for part in earlier.parts])
    assert found == sizes
    assert earlier.num_tokens == 24


def brought_together(window: int | None, offload: bool) -> list[float]:
    """Errors of keys and values that were kept in uneven stretches."""
    k, v = keys_and_values(30)
    whole = SequenceLayout(30, order="zigzag", documents=(0, 4, 30), weights=[1.0, 2.0, 1.0])
    earlier = EarlierKeys(offload=offload)
    for start, stop in ((0, 3), (3, 20), (20, 30)):
        layout = whole.stretch(start, stop)
        own_k, own_v = (layout.shard(x[:, start:stop]) for x in (k, v))
        earlier = earlier.followed_by(own_k, own_v, layout, window=window)
    first = 4 if window is None else 31 - window
    return [
        relative_error(got, x[:, first:]) for got, x in zip(earlier.whole(layout, window=window), (k, v), strict=True)
    ]


@pytest.mark.parametrize("window", [None, 8])
def test_keys_are_brought_together_on_every_rank(window: int | None) -> None:
    assert run_on_ranks(3, brought_together, window, window is None) == [[0.0, 0.0]] * 3


def test_no_keys_are_not_brought_together() -> None:
    with pytest.raises(InputError, match="there are no keys yet, of 0 tokens"):
        EarlierKeys().whole(SequenceLayout.local(3))


def test_detached_keys_have_no_graph_and_gather_no_gradients() -> None:
    k, v = keys_and_values(8, takes_gradient=True)
    earlier = EarlierKeys(requires_grad=True).followed_by(k * 2.0, v).detach()
    assert not earlier.takes_gradient
    q, own_k, own_v = (x.requires_grad_() for x in random_inputs(1, 1, 3, 2, 2, 4)[:3])
    softmax_attention(q, own_k, own_v, earlier=earlier).sum().backward()
    assert k.grad is None and own_k.grad is not None
    assert not earlier.parts[0].grads()[0].any()


def held_and_sent(method: SoftmaxMethod, num_stretches: int) -> tuple[int, int, int]:
    """Of a call after so many stretches: the size of the largest tensor that it makes, bytes sent, and messages of queries."""
    earlier = EarlierKeys(requires_grad=True)
    for seed in range(num_stretches):
        layout = SequenceLayout(24, order="zigzag")
        earlier = earlier.followed_by(*keys_and_values(24, seed, layout), layout)
    layout = SequenceLayout(24, order="zigzag", continues=24 * num_stretches)
    q, k, v, grad = (layout.shard(x).clone() for x in random_inputs(7, 1, 24, 2, 2, 4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with LargestTensor() as largest, record_traffic() as traffic:
        softmax_attention(leaves[0], leaves[1], leaves[2], earlier=earlier, layout=layout, method=method).backward(grad)
    events = [event for event in traffic.events if event.name == "queries"]
    return largest.num_elements, traffic.bytes_sent, len(events)


@pytest.mark.parametrize("method", METHODS)
def test_a_rank_never_has_the_earlier_keys_of_another_however_many_there_are(method: SoftmaxMethod) -> None:
    """Nothing that a call makes or sends grows with the number of earlier stretches."""
    few, many = (run_on_ranks(2, held_and_sent, method, number) for number in (1, 12))
    assert few == many
    assert {messages for _, _, messages in few} == {4}


def queries_sent(window: int) -> list[int]:
    whole = SequenceLayout(48, order="contiguous")
    first, second = whole.stretch(0, 24), whole.stretch(24, 48)
    earlier = EarlierKeys().followed_by(*keys_and_values(24, 0, first), first, window=window)
    q, k, v, _ = (second.shard(x) for x in random_inputs(7, 1, 24, 2, 2, 4))
    with record_traffic() as traffic:
        softmax_attention(q, k, v, earlier=earlier, layout=second, window=window, method="ring")
    return [event.bytes_sent for event in traffic.events if event.name == "queries"]


def test_with_a_window_only_queries_that_see_a_key_leave() -> None:
    """A window of five: the first four queries, which rank 0 has, see the last four keys, which rank 1 has."""
    queries, answers = 4 * 2 * 4 * 8, 4 * 2 * 4 * 8 + 4 * 2 * 8
    assert run_on_ranks(2, queries_sent, 5) == [[queries, 0], [0, answers]]


def copies_on_the_device(num_parts: int) -> tuple[int, int]:
    """Most parts of which copies lived at once, and how many were copied, in a forward and a backward pass."""
    earlier = EarlierKeys(offload=True, requires_grad=True)
    for seed in range(num_parts):
        earlier = earlier.followed_by(*keys_and_values(6, seed))
    living: list[weakref.ref[Tensor]] = []
    most, original = 0, HostMemory.fetch

    def fetch(self: HostMemory, *hosts: Tensor) -> Fetched:
        nonlocal most
        found = original(self, *hosts)
        living.append(weakref.ref(found._copies[0]))
        most = max(most, sum(x() is not None for x in living))
        return found

    q, k, v, grad = random_inputs(1, 1, 3, 2, 2, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HostMemory, "fetch", fetch)
        softmax_attention(q.requires_grad_(), k, v, earlier=earlier).backward(grad)
    return most, len(living)


def test_offloaded_parts_are_on_the_device_two_at_a_time() -> None:
    assert copies_on_the_device(7) == (2, 2 * 7)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_parts_in_pinned_memory_give_what_parts_on_the_gpu_give() -> None:
    found = []
    for offload in (False, True):
        earlier = EarlierKeys(offload=offload, requires_grad=True)
        for seed in range(9):
            earlier = earlier.followed_by(*(x.cuda() for x in keys_and_values(600, seed)))  # type: ignore[arg-type]
        q, k, v, grad = (x.cuda() for x in random_inputs(1, 1, 700, 4, 2, 4))
        q.requires_grad_()
        for _ in range(2):
            softmax_attention(q, k, v, earlier=earlier).backward(grad)
        assert q.grad is not None
        assert all(part.k.is_pinned() == offload for part in earlier.parts)
        found.append([q.grad, *(x for part in earlier.parts for x in part.grads())])
    assert worst(relative_error(x, y) for x, y in zip(*found, strict=True)) <= 1e-12


def test_offloaded_parts_and_their_gradients_are_in_host_memory_of_their_own() -> None:
    k, v = keys_and_values(6)
    earlier = EarlierKeys(offload=True, requires_grad=True).followed_by(k, v)
    part = earlier.parts[0]
    q, own_k, own_v, grad = random_inputs(1, 1, 3, 2, 2, 4)
    softmax_attention(q.requires_grad_(), own_k, own_v, earlier=earlier).backward(grad)
    assert part.host is not None and part.device == k.device
    once = [x.clone() for x in part.grads()]
    softmax_attention(q, own_k, own_v, earlier=earlier).backward(grad)
    for first, twice in zip(once, part.grads(), strict=True):
        assert first.any() and torch.equal(2 * first, twice)


def checkpointed(keeps: bool) -> tuple[float, int]:
    """A recomputed call gives the parts their gradients once, and where exchanges are kept its queries travel once."""
    layout = SequenceLayout(24, order="zigzag")
    results = []
    for checkpoint in (None, keeping_exchanges(torch_checkpoint) if keeps else torch_checkpoint):
        earlier = EarlierKeys(requires_grad=True).followed_by(*keys_and_values(24, 0, layout), layout)
        q, k, v, grad = (layout.shard(x).clone() for x in random_inputs(7, 1, 24, 2, 2, 4))
        leaves = [x.requires_grad_() for x in (q, k, v)]

        call = partial(softmax_attention, earlier=earlier, layout=layout, method="ring")
        with record_traffic() as traffic:
            o = call(*leaves) if checkpoint is None else checkpoint(call, *leaves, use_reentrant=False)
            o.backward(grad)
        messages = sum(event.name == "queries" and event.phase == "forward" for event in traffic.events)
        grads = [x.new_zeros(x.shape) if x.grad is None else x.grad for x in leaves]
        results.append((grads + list(earlier.parts[0].grads()), messages))
    (plain, _), (again, messages) = results
    return worst(relative_error(x, y) for x, y in zip(again, plain, strict=True)), messages


@pytest.mark.parametrize(("keeps", "messages"), [(True, 2), (False, 4)])
def test_a_recomputed_call_gives_gradients_once(keeps: bool, messages: int) -> None:
    assert run_on_ranks(2, checkpointed, keeps) == [(0.0, messages)] * 2


def test_reads_of_one_memory_add_up() -> None:
    q, k, v, grad = random_inputs(1, 1, 6, 2, 2, 4)
    found = []
    for count in (1, 2):
        earlier = EarlierKeys(requires_grad=True).followed_by(*keys_and_values(5))
        memory = longspan.write("softmax", k, v, earlier=earlier)
        torch.stack([(memory.read(q.clone().requires_grad_()) * grad).sum() for _ in range(count)]).sum().backward()
        found.append(earlier.parts[0].grads())
    assert worst(relative_error(twice, 2 * once) for once, twice in zip(*found, strict=True)) <= 1e-15


def good_inputs() -> dict[str, Any]:
    q, k, v, _ = random_inputs(15, 1, 8, 4, 2, 4)
    return {"q": q, "k": k, "v": v, "earlier": EarlierKeys().followed_by(*keys_and_values(5))}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"earlier": 3}, InputError, r"earlier must be longspan\.EarlierKeys or None; got 3"),
        ({"earlier": keys_and_values(5)}, InputError, "A pair of keys and values .* is an initial_state"),
        ({"initial_state": keys_and_values(5)}, InputError, "got earlier and an initial_state"),
        ({"output_final_state": True}, InputError, "got earlier and output_final_state=True"),
        ({"causal": False}, InputError, "with causal=False there is no state .* got earlier keys"),
        ({"layout": SequenceLayout.local(8, [0, 3, 8])}, InputError, "must say how many of them .* got continues=None"),
        ({"layout": SequenceLayout.local(8, continues=6)}, LayoutError, "6 earlier tokens; there are 5 in all"),
        (
            {"layout": SequenceLayout.for_rank(16, 2, 0)},
            LayoutError,
            "earlier stretches are on 1 ranks, .* has 2|for_rank",
        ),
        (
            {"earlier": EarlierKeys().followed_by(*keys_and_values(5, num_heads=1))},
            InputError,
            r"k must have the rows, heads, .* \[1, T, 1, 4\] in torch\.float64; got \(1, 8, 2, 4\)",
        ),
        (
            {"earlier": EarlierKeys().followed_by(*keys_and_values(5, dtype=torch.float32))},
            InputError,
            "in torch.float32; got .* in torch.float64. Keep one EarlierKeys for each layer",
        ),
    ],
)
def test_earlier_keys_that_do_not_fit_are_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        softmax_attention(**{**good_inputs(), **change})


def test_what_cannot_follow_is_refused() -> None:
    k, v = keys_and_values(5)
    earlier = EarlierKeys().followed_by(k, v)
    for arguments, message in (
        ((k, v[:, :4]), "the same B, T and H_kv"),
        ((k.float(), v.float()), "in torch.float64; got"),
        ((k, v, SequenceLayout.local(6)), "takes the 6 tokens"),
        ((k, v, SequenceLayout.local(5, [0, 2, 5])), "got continues=None"),
    ):
        with pytest.raises((InputError, LayoutError), match=message):
            earlier.followed_by(*arguments)
    with pytest.raises(InputError, match="window must be an integer"):
        earlier.followed_by(k, v, window=0)
    with pytest.raises(InputError, match="offload must be True or False"):
        EarlierKeys(offload=1)  # type: ignore[arg-type]


def test_a_changed_part_is_refused() -> None:
    inputs = good_inputs()
    memory = longspan.write("softmax", inputs["k"], inputs["v"], earlier=inputs["earlier"])
    inputs["earlier"].parts[0].v.zero_()
    with pytest.raises(InputError, match=r"earlier\.parts\[0\]\.v was changed in place"):
        memory.read(inputs["q"])


def test_a_whole_state_shorter_than_what_the_layout_continues_is_refused() -> None:
    inputs = {**good_inputs(), "earlier": None, "initial_state": keys_and_values(5)}
    layout = SequenceLayout.local(8, [0, 3, 8], continues=6)
    with pytest.raises(InputError, match=r"sees 6 earlier tokens \(continues=6\); the initial_state has 5"):
        softmax_attention(**inputs, layout=layout)
    assert softmax_attention(**inputs, layout=layout, window=6).shape == inputs["q"].shape
