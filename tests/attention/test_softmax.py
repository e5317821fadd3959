"""Softmax attention over ranks equals dense attention on each of them, whatever the method, the mask and the layout."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from longspan.attention.softmax import SoftmaxMethod, softmax_attention, write_softmax
from longspan.layout import Order, SequenceLayout
from tests.attention.softmax_reference import Case, Documents, compare, dense_attention, random_inputs
from tests.compare import relative_error, worst
from tests.ranks import run_on_ranks

METHODS: tuple[SoftmaxMethod, ...] = ("all_gather", "ring", "ulysses")
ORDERS: tuple[Order, ...] = ("contiguous", "zigzag")
PACKED: Documents = (0, 3, 4, 17, 41, 42, 53)
TOLERANCES = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 3e-3}


def check(num_ranks: int, cases: list[Case], tolerance: float = TOLERANCES[torch.float64]) -> None:
    """Every rank's outputs and gradients are those of dense attention."""
    for rank, answers in enumerate(run_on_ranks(num_ranks, compare, cases)):
        for case, errors in zip(cases, answers, strict=True):
            assert worst(errors) <= tolerance, (rank, case, errors)


def divisible(num_ranks: int, heads: int, method: SoftmaxMethod) -> bool:
    return method != "ulysses" or heads % num_ranks == 0


# One rank exchanges nothing, whatever the method.
@pytest.mark.slow_rows(r"^(ring|ulysses)-1$")
@pytest.mark.parametrize(
    "num_ranks", [1, pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("method", METHODS)
def test_every_rank_equals_dense_attention(num_ranks: int, method: SoftmaxMethod) -> None:
    settings: list[tuple[int, Documents, tuple[int, int], int]] = [
        (48, None, (12, 12), 7),
        (53, None, (12, 4), 20),
        (53, PACKED, (12, 1), 5),
        (48, (0, 24, 48), (12, 6), 11),
    ]
    check(
        num_ranks,
        [
            Case(tokens, method, order, causal, window if windowed else None, documents, heads, dim=4)
            for (tokens, documents, heads, window), order, causal, windowed in product(
                settings, ORDERS if num_ranks > 1 else ORDERS[:1], (True, False), (False, True)
            )
        ],
    )


@pytest.mark.slow_rows(r"^ulysses$")
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^all_gather$")
@pytest.mark.parametrize("method", METHODS)
def test_windows_of_one_token_to_all_but_one_are_right(method: SoftmaxMethod) -> None:
    check(
        3,
        [
            Case(53, method, order, causal, window, heads=(3, 1))
            for order, causal, window in product(ORDERS, (True, False), (1, 2, 17, 18, 19, 35, 52, 53, 99))
        ],
    )


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^ulysses$")
@pytest.mark.parametrize("method", METHODS)
def test_sequences_of_about_one_token_a_rank_are_right(method: SoftmaxMethod) -> None:
    # A token that sees itself alone has no gradient of its query, on a rank that may hold no other.
    check(
        4,
        [
            Case(tokens, method, order, causal, window, (0, 1, tokens) if packed else None, floor=1.0)
            for order, (tokens, causal, window, packed) in product(
                ORDERS, [(4, True, None, False), (5, False, 2, False), (5, True, None, True), (7, True, 2, True)]
            )
        ],
    )


@pytest.mark.parametrize("heads", [(6, 3), (6, 2), (6, 1), (2, 1), (2, 2), (10, 5)])
def test_ulysses_takes_any_number_of_heads_that_the_ranks_divide(heads: tuple[int, int]) -> None:
    """Also where key heads are fewer than ranks, or straddle two ranks."""
    check(2, [Case(37, "ulysses", order, heads=heads) for order in ORDERS])


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^all_gather$")
@pytest.mark.parametrize("method", ["all_gather", "ring"])
def test_heads_need_not_be_a_multiple_of_the_ranks(method: SoftmaxMethod) -> None:
    check(4, [Case(37, method, order, heads=heads) for order in ORDERS for heads in ((3, 1), (1, 1), (5, 5))])


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^dtype[02]$")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_and_single_precision_stay_close_to_float64(dtype: torch.dtype) -> None:
    check(
        3,
        [
            Case(53, method, order, True, window, documents, (6, 2), dtype)
            for method, order, window, documents in product(METHODS, ORDERS, (None, 9), (None, PACKED))
        ],
        TOLERANCES[dtype],
    )


def test_rows_that_documents_and_windows_cut_are_right_for_groups_of_heads() -> None:
    settings: list[tuple[Order, bool, int | None, Documents]] = [
        ("contiguous", True, None, (0, 20, 53)),
        ("contiguous", False, 9, None),
        ("zigzag", True, None, None),
        ("zigzag", True, 9, (0, 20, 53)),
    ]
    cases = [
        Case(53, method, order, causal, window, documents, (6, 2), rows=1)
        for method, (order, causal, window, documents) in product(METHODS, settings)
    ]
    check(3, cases)


# One rank exchanges nothing, whatever the method.
@pytest.mark.slow_rows(r"^(ring|ulysses)-1$")
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^ulysses-3$")
@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("method", METHODS)
def test_values_may_be_narrower_or_wider_than_keys(num_ranks: int, method: SoftmaxMethod) -> None:
    settings: list[tuple[int | None, Documents, tuple[int, int], bool]] = [
        (None, None, (6, 6), False),
        (7, PACKED, (6, 2), True),
        (20, None, (6, 3), False),
    ]
    check(
        num_ranks,
        [
            Case(53, method, order, True, window, documents, heads, two_phases=two_phases, dim=dim, value_dim=value_dim)
            for (window, documents, heads, two_phases), order, (dim, value_dim) in product(
                settings, ORDERS if num_ranks > 1 else ORDERS[:1], [(6, 4), (3, 8), (5, 1)]
            )
        ],
    )


def test_values_of_another_size_in_half_precision_stay_close_to_float64() -> None:
    cases = [Case(53, method, "zigzag", heads=(6, 2), dtype=torch.bfloat16, dim=6, value_dim=4) for method in METHODS]
    check(3, cases, TOLERANCES[torch.bfloat16])


def test_write_then_read_equals_one_call() -> None:
    check(
        2,
        [
            Case(37, method, "zigzag", window=window, heads=heads, two_phases=True)
            for method, window, heads in product((*METHODS, "auto"), (None, 5), ((4, 2), (4, 1)))
        ],
    )


def read_twice(method: SoftmaxMethod, partial_first: bool) -> float:
    q, k, v, grad = random_inputs(8, 1, 30, 4, 2, 8)
    layout = SequenceLayout(30)
    leaves = [layout.shard(x).clone().requires_grad_() for x in (q, k, v)]
    memory = write_softmax(leaves[1], leaves[2], layout=layout, method=method)
    out = memory.read(leaves[0]) + 2 * memory.read(leaves[0].flip(2))
    if partial_first:
        torch.autograd.grad(out, leaves[:1], layout.shard(grad), retain_graph=True)
    got = torch.autograd.grad(out, leaves, layout.shard(grad))
    whole = [x.clone().requires_grad_() for x in (q, k, v)]
    once = dense_attention(*whole, causal=True, documents=(0, 30), scale=8**-0.5)
    twice = dense_attention(whole[0].flip(2), *whole[1:], causal=True, documents=(0, 30), scale=8**-0.5)
    want = torch.autograd.grad(once + 2 * twice, whole, grad)
    return worst(relative_error(x, layout.shard(y)) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("partial_first", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_memory_that_is_read_twice_sums_both_gradients(method: SoftmaxMethod, partial_first: bool) -> None:
    """Also after a backward pass that asked for the queries' gradient alone and left those of the keys on their way."""
    assert worst(run_on_ranks(2, read_twice, method, partial_first)) <= 1e-11


def frozen_inputs(method: SoftmaxMethod) -> list[bool]:
    q, k, v, grad = random_inputs(9, 1, 20, 2, 2, 8)
    layout = SequenceLayout(20)
    equal = []
    for frozen in ((1, 2), (0, 2), (0,)):
        leaves = [layout.shard(x).clone().requires_grad_(i not in frozen) for i, x in enumerate((q, k, v))]
        whole = [x.clone().requires_grad_(i not in frozen) for i, x in enumerate((q, k, v))]
        softmax_attention(leaves[0], leaves[1], leaves[2], layout=layout, method=method).backward(layout.shard(grad))
        dense_attention(*whole, causal=True, documents=(0, 20), scale=8**-0.5).backward(grad)
        for x, y in zip(leaves, whole, strict=True):
            if x.grad is None or y.grad is None:
                equal.append(x.grad is y.grad)
            else:
                equal.append(relative_error(x.grad, layout.shard(y.grad)) <= 1e-11)
    return equal


@pytest.mark.parametrize("method", METHODS)
def test_inputs_that_need_no_gradient_get_none_and_change_nothing(method: SoftmaxMethod) -> None:
    assert all(all(equal) for equal in run_on_ranks(2, frozen_inputs, method))


def test_a_window_on_one_device_equals_dense_attention_at_the_size_of_a_tile() -> None:
    q, k, v, grad = random_inputs(3, 1, 700, 2, 1, 8)
    for causal, window in product((True, False), (64, 600, 699, 700, 5000)):
        ours, theirs = ([x.clone().requires_grad_() for x in (q, k, v)] for _ in range(2))
        out = softmax_attention(ours[0], ours[1], ours[2], causal=causal, window=window)
        want = dense_attention(*theirs, causal=causal, window=window, documents=(0, 700), scale=8**-0.5)
        assert relative_error(out, want) <= 1e-12
        for x, y in zip(torch.autograd.grad(out, ours, grad), torch.autograd.grad(want, theirs, grad), strict=True):
            assert relative_error(x, y) <= 1e-11


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
