"""Softmax attention over ranks equals dense attention on each, and computes, stores and sends no more than it must."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longspan.attention.softmax import all_gather, softmax_attention, write_softmax
from longspan.errors import InputError, LayoutError
from longspan.exchange import record_traffic
from longspan.layout import Order, SequenceLayout
from tests.attention.softmax_reference import dense_attention, random_inputs
from tests.ranks import raised, run_on_ranks

Documents = tuple[int, ...] | None
TOLERANCES = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def compare(
    seed: int,
    tokens: int,
    order: Order,
    causal: bool,
    documents: Documents,
    heads: tuple[int, int] = (4, 2),
    dtype: torch.dtype = torch.float64,
    two_phases: bool = False,
) -> list[tuple[float, float]]:
    """(largest error, largest value) of this rank's o, dq, dk and dv, for a random upstream gradient."""
    everything = random_inputs(seed, 2, tokens, *heads, 8, dtype)
    layout = SequenceLayout(tokens, order=order, documents=documents)
    q, k, v = (layout.shard(x).clone().requires_grad_() for x in everything[:3])
    if two_phases:
        out = write_softmax(k, v, layout=layout, causal=causal).read(q, 0.4)
    else:
        out = softmax_attention(q, k, v, causal=causal, layout=layout, scale=0.4)
    grads = torch.autograd.grad(out, (q, k, v), layout.shard(everything[3]))

    leaves = [x.double().requires_grad_() for x in everything[:3]]
    want = dense_attention(*leaves, causal=causal, documents=documents or (0, tokens), scale=0.4)
    want_grads = torch.autograd.grad(want, leaves, everything[3].double())
    errors = []
    for got, whole in zip((out, *grads), (want, *want_grads), strict=True):
        assert got.dtype == dtype
        errors.append(((got.double() - layout.shard(whole)).abs().max().item(), whole.abs().max().item()))
    return errors


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
@pytest.mark.parametrize("causal", [True, False])
def test_every_rank_equals_dense_attention(num_ranks: int, order: Order, causal: bool) -> None:
    cases: list[tuple[int, Documents, tuple[int, int]]] = [
        (48, None, (4, 4)),
        (53, None, (4, 2)),
        (53, (0, 3, 4, 17, 41, 42, 53), (3, 1)),
        (48, (0, 24, 48), (2, 2)),
        (64, (0, 1, 63, 64), (4, 2)),
    ]
    for seed, (tokens, documents, heads) in enumerate(cases):
        for errors in run_on_ranks(num_ranks, compare, seed, tokens, order, causal, documents, heads):
            for error, size in errors:
                assert error <= TOLERANCES[torch.float64] * max(1.0, size), (tokens, documents, errors)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("tokens", [4, 5, 7])
def test_sequences_of_about_one_token_a_rank_are_right(tokens: int, causal: bool) -> None:
    for order in ("contiguous", "zigzag"):
        for documents in (None, (0, 1, tokens)):
            for errors in run_on_ranks(4, compare, 5, tokens, order, causal, documents):
                assert max(error for error, _ in errors) <= 1e-11, (order, documents, errors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
def test_half_and_single_precision_stay_close_to_float64(dtype: torch.dtype, order: Order) -> None:
    documents = (0, 3, 4, 17, 41, 42, 53)
    for packed in (None, documents):
        for errors in run_on_ranks(2, compare, 6, 53, order, True, packed, (4, 2), dtype):
            for error, size in errors:
                assert error <= TOLERANCES[dtype] * max(1.0, size), errors


def compare_in_nan_filled_memory(order: Order, documents: Documents) -> list[tuple[float, float]]:
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    try:
        return compare(5, 53, order, True, documents)
    finally:
        torch.use_deterministic_algorithms(False)


def test_no_result_depends_on_memory_that_was_not_written() -> None:
    for order in ("contiguous", "zigzag"):
        for documents in (None, (0, 20, 53)):
            for errors in run_on_ranks(3, compare_in_nan_filled_memory, order, documents):
                assert all(error <= 1e-11 for error, _ in errors), errors


def test_write_then_read_equals_one_call() -> None:
    for errors in run_on_ranks(2, compare, 7, 37, "zigzag", True, None, (4, 2), torch.float64, True):
        assert max(error for error, _ in errors) <= 1e-11


def read_twice(partial_first: bool) -> float:
    q, k, v, grad = random_inputs(8, 1, 30, 4, 2, 8)
    layout = SequenceLayout(30)
    leaves = [layout.shard(x).clone().requires_grad_() for x in (q, k, v)]
    memory = write_softmax(leaves[1], leaves[2], layout=layout)
    out = memory.read(leaves[0]) + 2 * memory.read(leaves[0].flip(2))
    if partial_first:
        torch.autograd.grad(out, leaves[:1], layout.shard(grad), retain_graph=True)
    got = torch.autograd.grad(out, leaves, layout.shard(grad))
    whole = [x.clone().requires_grad_() for x in (q, k, v)]
    once = dense_attention(*whole, causal=True, documents=(0, 30), scale=8**-0.5)
    twice = dense_attention(whole[0].flip(2), *whole[1:], causal=True, documents=(0, 30), scale=8**-0.5)
    want = torch.autograd.grad(once + 2 * twice, whole, grad)
    return max((x - layout.shard(y)).abs().max().item() for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("partial_first", [False, True])
def test_a_memory_that_is_read_twice_sums_both_gradients(partial_first: bool) -> None:
    """Also after a backward pass that asked for the queries' gradient alone and left the reduction unused."""
    assert max(run_on_ranks(2, read_twice, partial_first)) <= 1e-11


def frozen_inputs() -> list[bool]:
    q, k, v, grad = random_inputs(9, 1, 20, 2, 2, 8)
    layout = SequenceLayout(20)
    equal = []
    for frozen in ((1, 2), (0, 2), (0,)):
        leaves = [layout.shard(x).clone().requires_grad_(i not in frozen) for i, x in enumerate((q, k, v))]
        whole = [x.clone().requires_grad_(i not in frozen) for i, x in enumerate((q, k, v))]
        softmax_attention(leaves[0], leaves[1], leaves[2], layout=layout).backward(layout.shard(grad))
        dense_attention(*whole, causal=True, documents=(0, 20), scale=8**-0.5).backward(grad)
        for x, y in zip(leaves, whole, strict=True):
            if x.grad is None or y.grad is None:
                equal.append(x.grad is y.grad)
            else:
                equal.append(torch.allclose(x.grad, layout.shard(y.grad), atol=1e-11))
    return equal


def test_inputs_that_need_no_gradient_get_none_and_change_nothing() -> None:
    assert all(all(equal) for equal in run_on_ranks(2, frozen_inputs))


class Collectives:
    """Names of the collectives that run inside the block, in order."""

    NAMES = ("all_gather_single", "all_gather_into_tensor", "all_to_all_single", "reduce_scatter_single", "all_reduce")

    def __enter__(self) -> list[str]:
        self.calls: list[str] = []
        self.originals = {name: getattr(dist, name) for name in self.NAMES if hasattr(dist, name)}
        for name, original in self.originals.items():
            setattr(dist, name, self._recorded(name, original))
        return self.calls

    def __exit__(self, *_: object) -> None:
        for name, original in self.originals.items():
            setattr(dist, name, original)

    def _recorded(self, name: str, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            return original(*args, **kwargs)

        return call


def collectives_of(order: Order, documents: Documents) -> tuple[list[str], list[str]]:
    q, k, v, grad = random_inputs(10, 1, 24, 4, 2, 8)
    layout = SequenceLayout(24, order=order, documents=documents)
    leaves = [layout.shard(x).clone().requires_grad_() for x in (q, k, v)]
    with Collectives() as forward:
        out = softmax_attention(leaves[0], leaves[1], leaves[2], layout=layout)
    with Collectives() as backward:
        out.backward(layout.shard(grad))
    return forward, backward


@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
def test_a_layer_takes_one_gather_forward_and_one_reduction_backward(order: Order) -> None:
    for forward, backward in run_on_ranks(3, collectives_of, order, None):
        assert len(forward) == 1
        assert forward[0].startswith("all_gather")
        assert backward == ["all_to_all_single"]


def test_no_collective_where_no_rank_needs_another() -> None:
    assert run_on_ranks(1, collectives_of, "contiguous", None) == [([], [])]
    assert run_on_ranks(3, collectives_of, "contiguous", (0, 5, 8, 16, 24)) == [([], [])] * 3


def bytes_sent(order: Order) -> tuple[int, int]:
    """Bytes that this rank sends forward and backward in a layer of 24 tokens, one row, one key head of 8, float64."""
    q, k, v, grad = random_inputs(16, 1, 24, 2, 1, 8)
    layout = SequenceLayout(24, order=order)
    leaves = [layout.shard(x).clone().requires_grad_() for x in (q, k, v)]
    with record_traffic() as traffic:
        softmax_attention(leaves[0], leaves[1], leaves[2], layout=layout).backward(layout.shard(grad))
    forward, backward = (
        sum(event.bytes_sent for event in traffic.events if event.phase == phase) for phase in ("forward", "backward")
    )
    return forward, backward


def test_backward_sends_no_gradient_that_the_causal_mask_makes_zero() -> None:
    token = 2 * 8 * 8
    assert run_on_ranks(3, bytes_sent, "contiguous") == [(16 * token, rank * 8 * token) for rank in range(3)]
    # Segments of 4 tokens: rank r sees those before 2P-1-r, and sends those that are not its own.
    assert run_on_ranks(3, bytes_sent, "zigzag") == [(16 * token, sent * 4 * token) for sent in (4, 3, 2)]


def order_of_events() -> list[str]:
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

    exchange = all_gather._Exchange
    names = ("start_gather", "wait_gather", "start_reduction", "wait_reductions")
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
        memory = write_softmax(leaves[1], leaves[2], layout=layout)
        memory.read(Projection.apply(leaves[0])).backward(layout.shard(grad))
    finally:
        for name in names:
            setattr(exchange, name, originals[name])
    return events


def test_the_query_projection_hides_the_gather_and_its_backward_hides_the_reduction() -> None:
    for events in run_on_ranks(2, order_of_events):
        assert events == [
            "start_gather",
            "query projection",
            "wait_gather",
            "start_reduction",
            "query projection's backward",
            "wait_reductions",
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


def largest_tensor(order: Order, causal: bool, documents: Documents) -> int:
    tokens = 1200
    layout = SequenceLayout(tokens, order=order, documents=documents)
    q, k, v, grad = (layout.shard(x).clone() for x in random_inputs(12, 1, tokens, 2, 1, 8))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with LargestTensor() as largest:
        softmax_attention(leaves[0], leaves[1], leaves[2], layout=layout, causal=causal).backward(grad)
    return largest.num_elements


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("documents", [None, (0, 500, 1200)])
def test_no_tensor_has_the_size_of_a_mask(causal: bool, documents: Documents) -> None:
    tokens, num_ranks = 1200, 2
    packed_keys_and_values = tokens * 2 * 8
    for order in ("contiguous", "zigzag"):
        for elements in run_on_ranks(num_ranks, largest_tensor, order, causal, documents):
            assert elements <= packed_keys_and_values < tokens // num_ranks * tokens


def computed_blocks(order: Order, causal: bool, documents: Documents) -> tuple[list[Any], list[Any]]:
    """(queries, keys, causal) of each kernel call of this rank, forward and backward."""
    forward: list[Any] = []
    backward: list[Any] = []
    block_forward, block_backward = all_gather.block_forward, all_gather.block_backward

    def recorded_forward(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        forward.append((q.shape[1], k.shape[1], options["causal"]))
        return block_forward(q, k, v, **options)

    def recorded_backward(grad: Tensor, q: Tensor, k: Tensor, *rest: Any, **options: Any) -> Any:
        backward.append((q.shape[1], k.shape[1], options["causal"]))
        return block_backward(grad, q, k, *rest, **options)

    module: Any = all_gather
    try:
        module.block_forward, module.block_backward = recorded_forward, recorded_backward
        layout = SequenceLayout(48, order=order, documents=documents)
        q, k, v, grad = (layout.shard(x).clone() for x in random_inputs(13, 1, 48, 2, 1, 8))
        softmax_attention(q.requires_grad_(), k, v, layout=layout, causal=causal).backward(grad)
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
                [(8, 8, True), (8, 8, True), (8, 40, False)],
                [(8, 8, False), (8, 8, True), (8, 8, True), (8, 32, False)],
                [(8, 8, True), (8, 8, True), (8, 16, False), (8, 24, False)],
            ],
        ),
        (
            "contiguous",
            True,
            (0, 20, 32, 48),
            [[(16, 16, True)], [(4, 4, True), (4, 16, False), (12, 12, True)], [(16, 16, True)]],
        ),
        ("contiguous", False, None, [[(16, 48, False)]] * 3),
        ("zigzag", False, None, [[(16, 48, False)]] * 3),
        (
            "contiguous",
            False,
            (0, 20, 32, 48),
            [[(16, 20, False)], [(4, 20, False), (12, 12, False)], [(16, 16, False)]],
        ),
    ]
    for order, causal, documents, want in cases:
        for rank, (forward, backward) in enumerate(run_on_ranks(3, computed_blocks, order, causal, documents)):
            assert forward == sorted(want[rank])
            assert backward == sorted(want[rank])


def test_one_device_is_one_call_of_pytorchs_own_kernel() -> None:
    forward, backward = computed_blocks_on_one_device()
    assert forward == backward == [(48, 48, True)]


def computed_blocks_on_one_device() -> tuple[list[Any], list[Any]]:
    return computed_blocks("contiguous", True, None)


def test_one_device_gives_the_bits_of_scaled_dot_product_attention() -> None:
    q, k, v, grad = random_inputs(14, 2, 65, 4, 4, 16, torch.float32)
    ours, theirs = ([x.clone().requires_grad_() for x in (q, k, v)] for _ in range(2))
    out = softmax_attention(ours[0], ours[1], ours[2])
    heads_first = [x.transpose(1, 2) for x in theirs]
    want = F.scaled_dot_product_attention(heads_first[0], heads_first[1], heads_first[2], is_causal=True).transpose(
        1, 2
    )
    out.backward(grad)
    want.backward(grad)
    assert torch.equal(out, want)
    for x, y in zip(ours, theirs, strict=True):
        assert x.grad is not None
        assert y.grad is not None
        assert torch.equal(x.grad, y.grad)


def good_inputs(tokens: int = 8) -> dict[str, Any]:
    q, k, v, _ = random_inputs(15, 1, tokens, 4, 2, 8, torch.float32)
    return {"q": q, "k": k, "v": v}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 8, 4, 8).double()}, r"one dtype; got q of torch.float64 and k of torch.float32. Cast"),
        ({"v": torch.zeros(1, 8, 2, 8).bfloat16()}, r"one dtype; got k of torch.float32 and v of torch.bfloat16"),
        ({"q": torch.zeros(1, 8, 3, 8)}, r"multiple of the number of key and value heads; got 3 and 2"),
        ({"v": torch.zeros(1, 8, 2, 4)}, r"same shape .* got k \(1, 8, 2, 8\) and v \(1, 8, 2, 4\)"),
        ({"q": torch.zeros(1, 7, 4, 8)}, r"batch rows, tokens and head dimension .* got q \(1, 7, 4, 8\)"),
        ({"q": torch.zeros(8, 4, 8)}, r"takes q \[B, T, H, D\] .* got q \(8, 4, 8\)"),
        (
            {
                "k": torch.zeros(1, 8, 2, 8).long(),
                "v": torch.zeros(1, 8, 2, 8).long(),
                "q": torch.zeros(1, 8, 4, 8).long(),
            },
            "takes float64, float32, bfloat16, float16; got k of torch.int64",
        ),
        (
            {"q": torch.zeros(0, 8, 4, 8), "k": torch.zeros(0, 8, 2, 8), "v": torch.zeros(0, 8, 2, 8)},
            "at least one row",
        ),
        ({"method": "ulises"}, r"method must be one of auto, all_gather; got 'ulises'"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        softmax_attention(**{**good_inputs(), **change})


def test_queries_that_do_not_fit_the_written_keys_are_refused() -> None:
    inputs = good_inputs()
    memory = write_softmax(inputs["k"], inputs["v"])
    with pytest.raises(InputError, match="multiple of the number of key and value heads; got 3 and 2"):
        memory.read(torch.zeros(1, 8, 3, 8))


def test_a_planning_layout_cannot_attend() -> None:
    with pytest.raises(LayoutError, match="for_rank"):
        softmax_attention(**good_inputs(4), layout=SequenceLayout.for_rank(8, 2, 0))


def attend_with_bad_inputs(tokens: int, **change: Tensor) -> list[str]:
    with Collectives() as calls:
        _, message = raised(attend_over, tokens, {**good_inputs(4), **change})
    return [message, *calls]


def attend_over(tokens: int, inputs: dict[str, Any]) -> Tensor:
    return softmax_attention(**inputs, layout=SequenceLayout(tokens))


def test_bad_input_is_refused_on_all_ranks_before_the_first_collective() -> None:
    for answer in run_on_ranks(2, attend_with_bad_inputs, 12):
        assert len(answer) == 1
        assert "takes the 6 tokens that rank" in answer[0]
    for answer in run_on_ranks(2, attend_with_wrong_dtype):
        assert len(answer) == 1
        assert "one dtype" in answer[0]


def attend_with_wrong_dtype() -> list[str]:
    return attend_with_bad_inputs(8, q=torch.zeros(1, 4, 4, 8).double())
