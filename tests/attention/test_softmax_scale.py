"""Softmax attention for scales of either sign and zero, for scores of -inf and of any size, and for random calls."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from longspan.attention.softmax import SoftmaxMethod, softmax_attention, write_softmax
from longspan.errors import InputError
from longspan.layout import Order, SequenceLayout
from longspan.ops.softmax import block as kernels
from tests.attention.softmax_reference import Documents, dense_attention, random_inputs
from tests.compare import relative_error, worst
from tests.ranks import run_on_ranks

METHODS: tuple[SoftmaxMethod, ...] = ("all_gather", "ring", "ulysses")
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 6e-2}
NEGATIVE_OR_ZERO = (-0.7, -1e-3, 0.0, -0.0)


@dataclass(frozen=True)
class Call:
    """One call of softmax attention; `size` multiplies the queries."""

    tokens: int = 29
    method: SoftmaxMethod = "all_gather"
    order: Order = "contiguous"
    causal: bool = True
    window: int | None = None
    documents: Documents = None
    heads: tuple[int, int] = (6, 2)
    dtype: torch.dtype = torch.float64
    scale: float = 1.0
    size: float = 1.0
    two_phases: bool = False


def errors_of(calls: list[Call]) -> list[float]:
    return [error_of(call, seed) for seed, call in enumerate(calls)]


def error_of(call: Call, seed: int) -> float:
    """The largest relative error of this rank's o, dq, dk and dv."""
    everything = random_inputs(seed, 2, call.tokens, *call.heads, 8, call.dtype)
    everything[0] = everything[0] * call.size
    layout = SequenceLayout(call.tokens, order=call.order, documents=call.documents)
    leaves = [layout.shard(x).clone().requires_grad_() for x in everything[:3]]
    if call.two_phases:
        memory = write_softmax(*leaves[1:], layout=layout, causal=call.causal, window=call.window, method=call.method)
        out = memory.read(leaves[0], call.scale)
    else:
        out = softmax_attention(
            *leaves, causal=call.causal, window=call.window, layout=layout, scale=call.scale, method=call.method
        )
    grads = torch.autograd.grad(out, leaves, layout.shard(everything[3]))
    whole = [x.double().requires_grad_() for x in everything[:3]]
    documents = call.documents or (0, call.tokens)
    want = dense_attention(*whole, causal=call.causal, documents=documents, scale=call.scale, window=call.window)
    want_grads = torch.autograd.grad(want, whole, everything[3].double())
    # dk is a product with q. Where softmax is one-hot or the scale is 0, the true dq and dk are 0 and rounding is all there is.
    floors = (0.1, 0.1, 0.1 * max(call.size, 1.0), 0.1)
    return worst(
        relative_error(got, layout.shard(right), floor)
        for got, right, floor in zip((out, *grads), (want, *want_grads), floors, strict=True)
    )


def check(num_ranks: int, calls: list[Call]) -> None:
    for rank, errors in enumerate(run_on_ranks(num_ranks, errors_of, calls)):
        for call, error in zip(calls, errors, strict=True):
            assert error <= TOLERANCES[call.dtype], (rank, call, error)


# Alone a rank has all heads; see the random calls, too.
@pytest.mark.slow_rows(r"^ulysses-1$")
@pytest.mark.slow_rows(r"^(ring|all_gather)-3$")
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^ulysses-3$")
@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("method", METHODS)
def test_a_negative_or_zero_scale_equals_dense_attention(num_ranks: int, method: SoftmaxMethod) -> None:
    settings: list[tuple[Order, bool, int | None, Documents]] = [
        ("contiguous", True, None, None),
        ("zigzag", True, 5, None),
        ("zigzag", True, None, (0, 3, 4, 17, 29)),
        ("contiguous", False, 4, (0, 12, 29)),
    ]
    check(
        num_ranks,
        [
            Call(29, method, order, causal, window, documents, scale=scale, dtype=dtype, two_phases=two_phases)
            for scale, (order, causal, window, documents), (dtype, two_phases) in product(
                NEGATIVE_OR_ZERO, settings, ((torch.float64, False), (torch.float32, True), (torch.bfloat16, False))
            )
        ],
    )


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^ulysses$")
@pytest.mark.parametrize("method", METHODS)
def test_scores_of_any_size_give_finite_and_right_results(method: SoftmaxMethod) -> None:
    check(
        2,
        [
            Call(29, method, "zigzag", window=window, documents=documents, scale=scale, size=size, dtype=dtype)
            for size, scale, (window, documents), dtype in product(
                (1e5, 1e8, 1e20), (0.5, -0.5), ((None, None), (5, (0, 12, 29))), (torch.float64, torch.bfloat16)
            )
        ],
    )


def random_call(generator: random.Random, num_ranks: int) -> Call:
    tokens = generator.randint(2 * num_ranks, 60)
    bounds = sorted(generator.sample(range(1, tokens), generator.randint(1, min(5, tokens - 1))))
    groups, kv_heads = generator.choice([(1, 1), (1, 2), (2, 2), (3, 1)])
    heads = num_ranks * groups * kv_heads
    return Call(
        tokens=tokens,
        method=generator.choice(METHODS),
        order=generator.choice(("contiguous", "zigzag")),
        causal=generator.random() < 0.6,
        window=generator.choice((None, 1, 2, 7, tokens - 1, tokens)),
        documents=(0, *bounds, tokens) if generator.random() < 0.5 else None,
        heads=(heads, kv_heads),
        dtype=generator.choice((torch.float64, torch.float64, torch.float32, torch.bfloat16)),
        scale=generator.choice((0.4, 1.0, -0.4, -2.0, 0.0)),
        two_phases=generator.random() < 0.5,
    )


@pytest.mark.parametrize("num_ranks", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2)), 3])
def test_random_calls_equal_dense_attention(num_ranks: int) -> None:
    generator = random.Random(num_ranks)
    check(num_ranks, [random_call(generator, num_ranks) for _ in range(120)])


def with_hidden_keys(dtype: torch.dtype, zero_values: bool = False) -> list[Tensor]:
    """q, k, v and an upstream gradient ``[1, 24, 4, 8]`` in which every query's score on the keys 0 to 9, 15 and 16 is -inf."""
    q, k, v, grad = random_inputs(5, 1, 24, 4, 2, 8)
    q[..., 0] = q[..., 0].abs() + 0.1
    hidden = [*range(10), 15, 16]
    k[:, hidden, :, 0] = -torch.inf
    if zero_values:
        # The log-sum-exp of a query on its own key is 0 and so is what it reads: as if it had read nothing.
        q[:, 12:14, :, 1:] = 0.0
        k[:, 12:14] = 0.0
        v[:, 12:14] = 0.0
    return [x.to(dtype) for x in (q, k, v, grad)]


def right_output(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, settings: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """o and dv in float64, where a query that sees nothing reads 0."""
    v = v.double().requires_grad_()
    # Against -1e300 a finite score is all, and alone they are none.
    finite = k.double().nan_to_num(neginf=-1e300)
    out = dense_attention(q.double(), finite, v, scale=1.0, **settings)
    seen = dense_attention(
        q.double(), finite, (k[..., :1] > -torch.inf).double().expand(v.shape), scale=1.0, **settings
    )
    out = out * (seen > 0)
    return out.detach(), torch.autograd.grad(out, v, grad.double())[0]


def errors_with_hidden_keys(method: SoftmaxMethod) -> list[float]:
    errors = []
    windows: tuple[tuple[bool, int | None], ...] = ((True, None), (True, 3), (True, 1), (False, None), (False, 2))
    for order, (causal, window), dtype, zero_values in product(
        ("contiguous", "zigzag"), windows, TOLERANCES, (False, True)
    ):
        q, k, v, grad = with_hidden_keys(dtype, zero_values)
        for documents in ((0, 24), (0, 8, 13, 24)):
            layout = SequenceLayout(24, order=order, documents=documents)  # type: ignore[arg-type]
            leaf = layout.shard(v).clone().requires_grad_()
            out = softmax_attention(
                layout.shard(q),
                layout.shard(k),
                leaf,
                causal=causal,
                window=window,
                scale=1.0,
                layout=layout,
                method=method,
            )
            (dv,) = torch.autograd.grad(out, leaf, layout.shard(grad))
            settings = {"causal": causal, "window": window, "documents": documents}
            want, want_dv = right_output(q, k, v, grad, settings)
            error = worst([relative_error(out, layout.shard(want)), relative_error(dv, layout.shard(want_dv))])
            errors.append(error / TOLERANCES[dtype])
    return errors


# As above.
@pytest.mark.slow_rows(r"^ulysses-1$")
@pytest.mark.slow_rows(r"^(ring|all_gather)-3$")
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^ring-1$")
@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("method", METHODS)
def test_keys_whose_score_is_minus_infinity_are_not_there(num_ranks: int, method: SoftmaxMethod) -> None:
    """A query that sees no other key reads zeros, as in PyTorch's attention."""
    if method == "ulysses" and num_ranks == 3:
        pytest.skip("4 heads are no multiple of 3 ranks")
    for errors in run_on_ranks(num_ranks, errors_with_hidden_keys, method):
        assert worst(errors) <= 1.0, errors


@pytest.mark.parametrize("form", ["cpu", "plain"])
def test_a_block_in_which_a_query_sees_nothing_has_no_share(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "flash_operator", lambda q: form)
    q, k, v, grad = with_hidden_keys(torch.float64)
    out, lse = kernels.block_forward(q, k, v, causal=True, scale=1.0)
    assert not out[:, :10].any()
    assert (lse[:, :, :10] == -torch.inf).all()
    assert torch.isfinite(lse[:, :, 10:]).all()
    finite = kernels.finite_lse(lse)
    _, _, dv = kernels.block_backward(grad, q, k, v, out, finite, causal=True, scale=1.0)
    want, want_dv = right_output(q, k, v, grad, {"causal": True, "window": None, "documents": (0, 24)})
    assert worst([relative_error(out, want), relative_error(dv, want_dv)]) <= 1e-12


def test_a_scale_that_learns_or_is_no_number_is_refused() -> None:
    q, k, v, _ = random_inputs(1, 1, 6, 2, 2, 4)
    with pytest.raises(InputError, match=r"takes no gradient; got a Parameter .*Multiply q by it and pass scale=1\.0"):
        softmax_attention(q, k, v, scale=torch.nn.Parameter(torch.tensor(0.5)))  # type: ignore[call-overload]
    for scale in (float("nan"), float("inf"), "0.5", [1.0], True, torch.ones(2)):
        with pytest.raises(InputError, match=r"scale must be a .*number"):
            softmax_attention(q, k, v, scale=scale)  # type: ignore[arg-type]
    assert torch.equal(softmax_attention(q, k, v, scale=torch.tensor(0.5)), softmax_attention(q, k, v, scale=0.5))  # type: ignore[call-overload]
