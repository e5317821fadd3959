"""Softmax attention after earlier tokens equals dense attention over all of them, on every rank, with every gradient."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import longspan
from longspan.attention.softmax import SoftmaxMethod, softmax_attention
from longspan.errors import InputError
from longspan.exchange import record_traffic
from longspan.layout import Order, SequenceLayout
from tests.attention.softmax_reference import dense_attention, random_inputs
from tests.compare import relative_error, worst
from tests.ranks import raised, run_on_ranks
from tests.unwritten import unwritten_memory_is_nan

METHODS: tuple[SoftmaxMethod, ...] = ("all_gather", "ring", "ulysses")
ORDERS: tuple[Order, ...] = ("contiguous", "zigzag")
NAMES = ("q", "k", "v", "past k", "past v")
SCALE = 0.4


@dataclass(frozen=True)
class Case:
    """A call after `past` tokens; `takes` are the outputs that this rank's loss takes, and `frozen` its constant inputs."""

    tokens: int
    past: int
    method: SoftmaxMethod = "all_gather"
    order: Order = "contiguous"
    window: int | None = None
    heads: tuple[int, int] = (12, 4)
    dtype: torch.dtype = torch.float64
    two_phases: bool = False
    takes: tuple[str, ...] = ("all",)
    frozen: tuple[tuple[str, ...], ...] = ((),)
    value_dim: int = 4


def of_rank(values: tuple[Any, ...], rank: int) -> Any:
    return values[rank % len(values)]


def kept(x: Tensor, window: int | None) -> Tensor:
    return x if window is None else x[:, max(0, x.shape[1] + 1 - window) :]


def expected(case: Case, leaves: list[Tensor], upstream: list[Tensor], num_ranks: int) -> list[Tensor]:
    """o, the final keys and values, and the gradients of the sum of the ranks' losses."""
    q, k, v, past_k, past_v = leaves
    k, v = torch.cat([past_k, k], dim=1), torch.cat([past_v, v], dim=1)
    everyone = torch.cat([q.new_zeros(q.shape[0], case.past, *q.shape[2:]), q], dim=1)
    bounds = (0, case.past + case.tokens)
    o = dense_attention(everyone, k, v, causal=True, documents=bounds, scale=SCALE, window=case.window)[:, case.past :]
    outputs = [o, kept(k, case.window), kept(v, case.window)]
    owner = torch.zeros(case.tokens, dtype=torch.int64)
    for rank in range(num_ranks):
        for start, stop in SequenceLayout.for_rank(case.tokens, num_ranks, rank, case.order).segments:
            owner[start:stop] = rank
    takes_o = torch.tensor([of_rank(case.takes, rank) in ("all", "o") for rank in range(num_ranks)])
    weight = sum(rank + 1 for rank in range(num_ranks) if of_rank(case.takes, rank) in ("all", "state"))
    weights = [takes_o[owner][:, None, None] * upstream[0], weight * upstream[1], weight * upstream[2]]
    loss = torch.stack([(x * y).sum() for x, y in zip(outputs, weights, strict=True)]).sum()
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return [*(x.detach() for x in outputs), *grads]


@unwritten_memory_is_nan()
def compare(cases: list[Case]) -> list[dict[str, float]]:
    return [_compare(case, seed) for seed, case in enumerate(cases)]


def _compare(case: Case, seed: int) -> dict[str, float]:
    layout = SequenceLayout(case.tokens, order=case.order)
    rank, num_ranks = layout.rank, layout.num_ranks
    heads, kv_heads = case.heads
    sizes = 4, case.dtype, case.value_dim
    q, k, v, grad_o = random_inputs(seed, 2, case.tokens, heads, kv_heads, *sizes)
    past = random_inputs(seed + 1000, 2, case.past, 1, kv_heads, *sizes)[1:3]
    upstream = random_inputs(seed + 2000, 2, case.tokens + case.past, 1, kv_heads, *sizes)[1:3]
    upstream = [grad_o, *(kept(x, case.window) for x in upstream)]
    frozen = of_rank(case.frozen, rank)
    own = [layout.shard(x) for x in (q, k, v)] + past
    own = [x.clone().requires_grad_(name not in frozen) for name, x in zip(NAMES, own, strict=True)]
    state = (own[3], own[4])
    options: dict[str, Any] = {"window": case.window, "layout": layout, "method": case.method}
    options |= {"initial_state": state, "output_final_state": True}
    if case.two_phases:
        memory = longspan.write("softmax", own[1], own[2], num_heads=heads, **options)
        with torch.no_grad():
            memory.read(own[0], SCALE)
        o = memory.read(own[0], SCALE)
        final = memory.final_state()
    else:
        o, final = softmax_attention(own[0], own[1], own[2], scale=SCALE, **options)
    takes = of_rank(case.takes, rank)
    losses = [(o * layout.shard(upstream[0])).sum()] if takes in ("all", "o") else []
    if takes in ("all", "state"):
        losses += [(rank + 1) * (x * y).sum() for x, y in zip(final, upstream[1:], strict=True)]
    torch.stack(losses).sum().backward()

    leaves = [x.double().clone().requires_grad_() for x in (q, k, v, *past)]
    want = expected(case, leaves, [x.double() for x in upstream], num_ranks)
    assert all(x.dtype == case.dtype for x in (o, *final))
    errors = {"o": relative_error(o, layout.shard(want[0]), 1e-3)}
    errors |= {f"final {name}": relative_error(got, x) for name, got, x in zip("kv", final, want[1:3], strict=True)}
    for name, x, grad in zip(NAMES, own, want[3:], strict=True):
        if name.startswith("past"):
            got = torch.zeros_like(x) if x.grad is None else x.grad.clone()
            dist.all_reduce(got)
        elif name in frozen:
            continue
        else:
            got, grad = torch.zeros_like(x) if x.grad is None else x.grad, layout.shard(grad)
        errors[f"d {name}"] = relative_error(got, grad, 1.0)
    return errors


def check(num_ranks: int, cases: list[Case], tolerance: float = 1e-11) -> None:
    for rank, answers in enumerate(run_on_ranks(num_ranks, compare, cases)):
        for case, errors in zip(cases, answers, strict=True):
            assert worst(errors) <= tolerance, (rank, case, errors)


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^ulysses-3$")
@pytest.mark.parametrize(
    "num_ranks", [1, pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("method", METHODS)
def test_every_rank_equals_dense_attention_over_past_and_present(num_ranks: int, method: SoftmaxMethod) -> None:
    cases = [
        Case(tokens, past, method, order, window, heads, two_phases=window == 7)
        for order, (tokens, past), (window, heads) in product(
            ORDERS if num_ranks > 1 else ORDERS[:1],
            [(21, 9), (5, 30), (8, 0)] if num_ranks in (1, 4) else [(21, 9)],
            [(None, (12, 4)), (7, (12, 1)), (12, (12, 12)), (1, (12, 6)), (40, (12, 4))],
        )
    ]
    check(num_ranks, cases)


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_values_of_another_size_than_keys_have_a_past_and_a_final_state(num_ranks: int, method: SoftmaxMethod) -> None:
    cases = [
        Case(21, 9, method, order, window, (4, 2), value_dim=value_dim)
        for order, window, value_dim in product(ORDERS if num_ranks > 1 else ORDERS[:1], (None, 7), (2, 7))
    ]
    check(num_ranks, cases)


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_stays_close_to_float64(method: SoftmaxMethod) -> None:
    check(2, [Case(21, 9, method, "zigzag", w, (6, 2), torch.bfloat16) for w in (None, 7)], 3e-2)


@pytest.mark.slow_rows(r"^(ring|all_gather)")
@pytest.mark.parametrize("method", METHODS)
def test_ranks_may_use_either_output_and_freeze_any_input(method: SoftmaxMethod) -> None:
    """Every combination that lets a rank's loss take other outputs, or other inputs take gradients, than another rank's."""
    check(
        2,
        [
            Case(11, 5, method, order, window, (4, 2), takes=takes, frozen=frozen, two_phases=two_phases)
            for order, window, two_phases, (takes, frozen) in product(
                ORDERS,
                (None, 4),
                (False, True),
                [
                    (("o", "state"), ((),)),
                    (("state", "o"), ((),)),
                    (("state",), ((),)),
                    (("o",), (("q",), ())),
                    (("all",), (("k", "v"), ())),
                    (("state", "all"), ((), ("k", "v"))),
                    (("o",), (("q", "k", "v"), ())),
                ],
            )
        ],
    )


@pytest.mark.parametrize("window", [None, 1, 5, 100])
def test_token_by_token_attention_gives_what_one_call_gives(window: int | None) -> None:
    q, k, v, _ = random_inputs(4, 2, 17, 4, 2, 8)
    want, want_state = softmax_attention(q, k, v, window=window, output_final_state=True)
    state = None
    outputs = []
    for position in range(17):
        token = (x[:, position : position + 1] for x in (q, k, v))
        o, state = softmax_attention(*token, window=window, initial_state=state, output_final_state=True)
        outputs.append(o)
    assert relative_error(torch.cat(outputs, dim=1), want) <= 1e-14
    assert state is not None
    for got, expected_state in zip(state, want_state, strict=True):
        assert got.shape[1] == (17 if window is None else min(window - 1, 17))
        assert torch.equal(got, expected_state)


def prefilled_then_one_token(method: SoftmaxMethod, window: int | None) -> float:
    """A prompt over ranks, and the token after it on each of them alone."""
    q, k, v, _ = random_inputs(5, 1, 20, 4, 2, 8)
    layout = SequenceLayout(19, order="zigzag")
    prompt = [layout.shard(x[:, :19]) for x in (q, k, v)]
    _, state = softmax_attention(*prompt, window=window, layout=layout, method=method, output_final_state=True)
    last = softmax_attention(q[:, 19:], k[:, 19:], v[:, 19:], window=window, initial_state=state)
    want = dense_attention(q, k, v, causal=True, documents=(0, 20), scale=8**-0.5, window=window)
    return relative_error(last, want[:, 19:])


@pytest.mark.parametrize("window", [None, 4])
def test_what_a_prefill_over_ranks_returns_is_decoded_from_on_one(window: int | None) -> None:
    assert worst(run_on_ranks(3, prefilled_then_one_token, "ring", window)) <= 1e-13


def bytes_of_a_final_state(window: int | None) -> int:
    _, k, v, _ = random_inputs(5, 1, 24, 2, 1, 4)
    layout = SequenceLayout(24)
    options: dict[str, Any] = {"layout": layout, "window": window, "output_final_state": True}
    memory = longspan.write("softmax", layout.shard(k), layout.shard(v), **options)
    with record_traffic() as traffic:
        memory.final_state()
    return traffic.bytes_sent


def test_a_windows_final_state_is_gathered_from_its_owners_alone() -> None:
    """Three ranks, one head, D 4, float64: of a window of 4, three tokens, which the last rank holds."""
    token = 2 * 4 * 8
    assert run_on_ranks(3, bytes_of_a_final_state, 4) == [2 * 3 * token] * 3
    assert run_on_ranks(3, bytes_of_a_final_state, None) == [2 * 8 * token] * 3


def good_inputs() -> dict[str, Any]:
    q, k, v, _ = random_inputs(15, 1, 8, 4, 2, 8, torch.float32)
    return {"q": q, "k": k, "v": v, "initial_state": (k[:, :3], v[:, :3])}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"initial_state": torch.zeros(1, 3, 2, 8)}, r"must be the pair \(k, v\) of earlier tokens.*got a Tensor"),
        ({"initial_state": (torch.zeros(1, 3, 2, 8),) * 3}, r"must be the pair \(k, v\)"),
        ({"initial_state": (torch.zeros(1, 3, 2, 8), None)}, r"initial_state\[1\] must be a torch.Tensor"),
        (
            {"initial_state": (torch.zeros(1, 3, 2, 8), torch.zeros(1, 4, 2, 8))},
            r"initial_state\[1\] must be \[B, L, H_kv, D_v\] = \(1, L, 2, 8\) .* as v is.* got \(1, 4, 2, 8\)",
        ),
        ({"initial_state": (torch.zeros(1, 3, 4, 8),) * 2}, r"initial_state\[0\] .* got \(1, 3, 4, 8\)"),
        ({"initial_state": (torch.zeros(1, 3, 2, 8).double(),) * 2}, "got .* in torch.float64. Pass what"),
        ({"causal": False}, "with causal=False there is no state before or after the sequence; got an initial_state"),
        (
            {"causal": False, "initial_state": None, "output_final_state": True},
            "got output_final_state=True. Leave out initial_state",
        ),
        ({"layout": SequenceLayout.local(8, [0, 3, 8])}, "documents have keys and values of different lengths"),
        ({"output_final_state": 1}, "output_final_state must be True or False"),
    ],
)
def test_states_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        softmax_attention(**{**good_inputs(), **change})


def test_a_final_state_that_was_not_kept_and_a_changed_initial_one_are_refused() -> None:
    inputs = good_inputs()
    memory = longspan.write("softmax", inputs["k"], inputs["v"], initial_state=inputs["initial_state"])
    with pytest.raises(InputError, match="written with output_final_state=False"):
        memory.final_state()
    inputs["initial_state"][1].zero_()
    with pytest.raises(InputError, match=r"initial_state\[1\] was changed in place|v was changed in place"):
        memory.read(inputs["q"])


def refused_on_ranks() -> tuple[str, int]:
    layout = SequenceLayout(16)
    with record_traffic() as traffic:
        _, message = raised(lambda: softmax_attention(**good_inputs(), causal=False, layout=layout))
    return message, traffic.num_collectives


def test_states_are_refused_on_all_ranks_before_the_first_collective() -> None:
    for message, num_collectives in run_on_ranks(2, refused_on_ranks):
        assert "with causal=False there is no state" in message
        assert num_collectives == 0
