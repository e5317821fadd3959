"""Softmax attention with bounded scores (softcap) and with sinks equals dense attention on every rank, every gradient included."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import longspan
from longspan.attention.softmax import SoftmaxMethod, softmax_attention
from longspan.errors import InputError
from longspan.layout import Order, SequenceLayout
from longspan.ops.softmax import block as kernels
from tests.attention.softmax_reference import Case, Documents, compare, dense_attention, random_inputs
from tests.compare import relative_error, worst
from tests.ranks import run_on_ranks

METHODS: tuple[SoftmaxMethod, ...] = ("all_gather", "ring", "ulysses")
ORDERS: tuple[Order, ...] = ("contiguous", "zigzag")
PACKED: Documents = (0, 3, 4, 17, 41, 42, 53)


def check(num_ranks: int, cases: list[Case], tolerance: float = 1e-11) -> None:
    for rank, answers in enumerate(run_on_ranks(num_ranks, compare, cases)):
        for case, errors in zip(cases, answers, strict=True):
            assert len(errors) == 4 + case.with_sinks - len(case.frozen)
            assert worst(errors) <= tolerance, (rank, case, errors)


@pytest.mark.slow_rows(r"-2$")
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^ulysses-3$")
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("method", METHODS)
def test_softcap_and_sinks_equal_dense_attention(num_ranks: int, method: SoftmaxMethod) -> None:
    settings: list[tuple[bool, int | None, Documents, tuple[int, int], bool]] = [
        (True, None, None, (6, 6), False),
        (True, 7, PACKED, (6, 2), True),
        (False, 20, None, (6, 1), False),
    ]
    check(
        num_ranks,
        [
            Case(
                53, method, order, causal, window, documents, heads, two_phases=two_phases, dim=6, value_dim=4,
                softcap=softcap, with_sinks=with_sinks,
            )
            for (causal, window, documents, heads, two_phases), order, (softcap, with_sinks) in product(
                settings, ORDERS if num_ranks > 1 else ORDERS[:1], [(0.7, False), (None, True), (2.0, True)]
            )
        ],
    )  # fmt: skip


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^ring$")
@pytest.mark.parametrize("method", METHODS)
def test_they_are_right_of_about_one_token_a_rank(method: SoftmaxMethod) -> None:
    cases = [
        Case(tokens, method, order, floor=1.0, softcap=1.0, with_sinks=True)
        for tokens, order in product((4, 5), ORDERS)
    ]
    check(4, cases)


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_stays_close_to_float64(method: SoftmaxMethod) -> None:
    case = Case(53, method, "zigzag", heads=(6, 2), dtype=torch.bfloat16, softcap=2.0, with_sinks=True)
    check(3, [case], 3e-2)


@pytest.mark.parametrize("method", METHODS)
def test_sinks_may_be_all_that_learns(method: SoftmaxMethod) -> None:
    check(
        2,
        [
            Case(37, method, order, frozen=frozen, with_sinks=True)
            for order in ORDERS
            for frozen in ((0, 1, 2), (1, 2), (0,))
        ],
    )


def errors_where_ranks_differ(method: SoftmaxMethod, order: Order) -> list[float]:
    """Errors of the gradients of sinks and of the keys and values of rank 0, where rank 1 has frozen all but the sinks."""
    q, k, v, grad = random_inputs(4, 1, 20, 4, 2, 8)
    sinks = torch.linspace(-1.0, 2.0, 4, dtype=torch.float64)
    layout = SequenceLayout(20, order=order)
    shards = [layout.shard(x).clone() for x in (q, k, v)]
    for x in shards[1:]:
        x.requires_grad_(layout.rank == 0)
    own = sinks.clone().requires_grad_()
    softmax_attention(shards[0], shards[1], shards[2], scale=0.4, sinks=own, layout=layout, method=method).backward(
        layout.shard(grad)
    )
    leaves = [x.clone().requires_grad_() for x in (k, v, sinks)]
    want = dense_attention(q, leaves[0], leaves[1], causal=True, documents=(0, 20), scale=0.4, sinks=leaves[2])
    want_grads = torch.autograd.grad(want, leaves, grad)
    assert own.grad is not None
    torch.distributed.all_reduce(own.grad)
    errors = [relative_error(own.grad, want_grads[2])]
    for x, y in zip(shards[1:], want_grads, strict=False):
        assert (x.grad is None) == (layout.rank == 1)
        if x.grad is not None:
            errors.append(relative_error(x.grad, layout.shard(y)))
    return errors


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("method", METHODS)
def test_a_rank_whose_sinks_alone_learn_returns_the_gradients_of_others_keys(
    method: SoftmaxMethod, order: Order
) -> None:
    for errors in run_on_ranks(2, errors_where_ranks_differ, method, order, timeout=20.0):
        assert worst(errors) <= 1e-11


def errors_where_a_rank_takes_the_final_state(method: SoftmaxMethod) -> list[float]:
    """Errors of the gradients of sinks, from rank 0's loss on o, and of rank 1's keys, from its loss on the final state."""
    q, k, v, grad = random_inputs(4, 1, 20, 4, 2, 8)
    layout = SequenceLayout(20)
    shards = [layout.shard(x).clone() for x in (q, k, v)]
    shards[1].requires_grad_(layout.rank == 1)
    own = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    o, final = softmax_attention(
        shards[0], shards[1], shards[2], sinks=own, output_final_state=True, layout=layout, method=method
    )
    ((o * layout.shard(grad)).sum() if layout.rank == 0 else (final[0] * k).sum()).backward()
    assert own.grad is not None
    torch.distributed.all_reduce(own.grad)
    sinks = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    want = dense_attention(q, k, v, causal=True, documents=(0, 20), scale=8**-0.5, sinks=sinks)
    seen = (want * grad)[:, :10].sum()
    errors = [relative_error(own.grad, torch.autograd.grad(seen, sinks)[0])]
    if layout.rank == 1:
        assert shards[1].grad is not None
        errors.append(relative_error(shards[1].grad, layout.shard(k)))
    return errors


@pytest.mark.parametrize("method", METHODS)
def test_a_rank_whose_sinks_alone_learn_takes_part_in_the_final_state(method: SoftmaxMethod) -> None:
    for errors in run_on_ranks(2, errors_where_a_rank_takes_the_final_state, method, timeout=20.0):
        assert worst(errors) <= 1e-11


def errors_after_a_past(method: SoftmaxMethod, window: int | None) -> list[float]:
    """Errors of o and of the gradients of q, of the past and of the sinks, of 11 tokens after 5."""
    q, k, v, grad = random_inputs(3, 2, 16, 4, 2, 8)
    sinks = torch.linspace(-1.0, 2.0, 4, dtype=torch.float64)
    layout = SequenceLayout(11, order="zigzag")
    shards = [layout.shard(x[:, 5:]).clone().requires_grad_() for x in (q, k, v)]
    past = k[:, :5].clone().requires_grad_(), v[:, :5].clone().requires_grad_()
    own = sinks.clone().requires_grad_()
    o, final = softmax_attention(
        shards[0], shards[1], shards[2], scale=0.4, window=window, softcap=1.5, sinks=own, initial_state=past,
        output_final_state=True, layout=layout, method=method,
    )  # fmt: skip
    got = torch.autograd.grad(
        [o, *final], [*past, own], [layout.shard(grad[:, 5:]), *(torch.zeros_like(x) for x in final)]
    )
    for x in got:
        torch.distributed.all_reduce(x)
    leaves = [x.clone().requires_grad_() for x in (q, k, v, sinks)]
    options: dict[str, Any] = {"causal": True, "documents": (0, 16), "scale": 0.4, "window": window, "softcap": 1.5}
    want = dense_attention(leaves[0], leaves[1], leaves[2], sinks=leaves[3], **options)[:, 5:]
    want_grads = torch.autograd.grad(want, leaves[1:], grad[:, 5:])
    expected = [want_grads[0][:, :5], want_grads[1][:, :5], want_grads[2]]
    return [relative_error(o, layout.shard(want)), *(relative_error(x, y) for x, y in zip(got, expected, strict=True))]


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("method", METHODS)
def test_they_hold_for_keys_of_the_past(method: SoftmaxMethod, window: int | None) -> None:
    for errors in run_on_ranks(2, errors_after_a_past, method, window):
        assert worst(errors) <= 1e-11


def test_a_sink_of_minus_infinity_is_none_and_a_large_one_takes_all() -> None:
    q, k, v, grad = random_inputs(5, 1, 12, 2, 2, 4)
    q.requires_grad_()
    plain = softmax_attention(q, k, v)
    (want,) = torch.autograd.grad(plain, q, grad)
    for sinks, factor in ((torch.full((2,), -torch.inf), 1.0), (torch.full((2,), 1e4), 0.0)):
        sinks.requires_grad_()
        o = softmax_attention(q, k, v, sinks=sinks)
        dq, dsinks = torch.autograd.grad(o, (q, sinks), grad)
        torch.testing.assert_close(o, factor * plain)
        torch.testing.assert_close(dq, factor * want)
        assert not dsinks.any()


def test_scores_are_formed_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, grad = random_inputs(6, 2, 70, 4, 2, 8)
    q.requires_grad_()
    k.requires_grad_()
    want = softmax_attention(q, k, v, softcap=1.0)
    want_grads = torch.autograd.grad(want, (q, k), grad)
    for most in (2 * 4 * 70 * 9, 1):
        monkeypatch.setattr(kernels, "MOST_SCORES", most)
        o = softmax_attention(q, k, v, softcap=1.0)
        torch.testing.assert_close(o, want)
        torch.testing.assert_close(torch.autograd.grad(o, (q, k), grad), want_grads)


def good_inputs() -> dict[str, Any]:
    q, k, v, _ = random_inputs(15, 1, 8, 4, 2, 8, torch.float32)
    return {"q": q, "k": k, "v": v}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"softcap": 0.0}, r"softcap must be above 0, the bound of scores; got 0.0 \(float\). Leave it out"),
        ({"softcap": -1}, "softcap must be above 0"),
        ({"softcap": float("nan")}, "softcap must be a finite number"),
        ({"softcap": torch.ones(())}, "softcap must be a finite number; got a Tensor"),
        ({"sinks": 0.0}, "sinks must be a torch.Tensor; got 0.0"),
        ({"sinks": torch.zeros(2)}, r"sinks must be \[H\] = \(4,\), one score per query head; got shape \(2,\)"),
        ({"sinks": torch.zeros(4).long()}, "sinks must be a floating-point tensor"),
        ({"sinks": torch.zeros(4, device="meta")}, "q on cpu and sinks on meta"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    inputs = good_inputs()
    with pytest.raises(InputError, match=message):
        softmax_attention(**{**inputs, **change})
    memory = longspan.write("softmax", inputs["k"], inputs["v"])
    with pytest.raises(InputError, match=message):
        memory.read(inputs["q"], **change)


def refused_on_ranks() -> tuple[str, int]:
    inputs = good_inputs()
    with longspan.record_traffic() as traffic:
        try:
            softmax_attention(**inputs, sinks=torch.zeros(3), layout=SequenceLayout(16))
        except InputError as error:
            return str(error), traffic.num_collectives
    return "", -1


def test_they_are_refused_on_all_ranks_before_the_first_collective() -> None:
    for message, num_collectives in run_on_ranks(2, refused_on_ranks):
        assert "sinks must be [H]" in message
        assert num_collectives == 0


def test_a_compiled_call_has_them() -> None:
    q, k, v, grad = random_inputs(7, 1, 20, 4, 2, 8, torch.float32)
    sinks = torch.linspace(-1.0, 2.0, 4)

    def attend(*inputs: Tensor) -> Tensor:
        return softmax_attention(inputs[0], inputs[1], inputs[2], softcap=1.0, sinks=inputs[3])

    leaves = [x.clone().requires_grad_() for x in (q, k, v, sinks)]
    want = attend(*leaves)
    o = torch.compile(attend, backend="aot_eager", fullgraph=True)(*leaves)
    torch.testing.assert_close(o, want)
    torch.testing.assert_close(torch.autograd.grad(o, leaves, grad), torch.autograd.grad(want, leaves, grad))
