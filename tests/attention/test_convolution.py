"""Short convolutions over ranks equal their definition on each, with every gradient, and cost no more than they must."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from longspan.attention import shift
from longspan.attention.convolution import causal_conv1d
from longspan.attention.shift import token_shift
from longspan.comm.all_to_all import Flight
from longspan.errors import InputError, LayoutError
from longspan.exchange import halo, record_traffic
from longspan.layout import Order, SequenceLayout
from longspan.ops import convolution
from tests.attention.convolution_reference import (
    LENGTHS,
    ORDERS,
    Documents,
    definition,
    documents_of,
    inputs,
)
from tests.compare import relative_error, worst, worst_of
from tests.exchange.test_exchange import Noted, NotedWork
from tests.exchange.test_halo import HIDDEN_HALO
from tests.ranks import raised, run_on_ranks
from tests.unwritten import unwritten_memory_is_nan


def errors_on_rank(
    seq_len: int,
    taps: int,
    documents: Documents,
    order: Order,
    *,
    with_bias: bool = True,
    with_states: bool = False,
    activation: str | None = "silu",
    batch: int = 1,
    dtype: torch.dtype = torch.float64,
    floor: float = 0.0,
) -> dict[str, float]:
    """Errors of this rank's outputs and gradients; those of replicated inputs are summed over the ranks."""
    given = inputs(seq_len, taps, documents, batch=batch, dtype=dtype)
    names = ["x", "weight", *(["bias"] if with_bias else []), *(["initial_state"] if with_states else [])]
    num_ranks = dist.get_world_size()

    whole = {name: given[name].double().requires_grad_() for name in names}
    expected, expected_final = definition(
        whole["x"], whole["weight"], whole.get("bias"), activation, documents, whole.get("initial_state")
    )
    loss = (expected * given["grad_y"].double()).sum()
    if with_states:
        # Every rank weighs the final state its own way; its gradient is the sum over ranks.
        loss = loss + sum(range(1, num_ranks + 1)) * (expected_final * given["grad_final"].double()).sum()
    expected_grads = dict(zip(names, torch.autograd.grad(loss, list(whole.values())), strict=True))

    layout = SequenceLayout(seq_len, order=order, documents=documents)
    own = {name: (layout.shard(given[name]) if name == "x" else given[name]).clone().requires_grad_() for name in names}
    result = causal_conv1d(
        own["x"],
        own["weight"],
        own.get("bias"),
        activation,
        layout,
        initial_state=own.get("initial_state"),
        output_final_state=with_states,
    )
    outputs = [result] if isinstance(result, Tensor) else list(result)
    grad_outputs = [layout.shard(given["grad_y"])]
    if with_states:
        grad_outputs.append((layout.rank + 1) * given["grad_final"])
    grads = dict(zip(names, torch.autograd.grad(outputs, list(own.values()), grad_outputs), strict=True))

    assert all(got.dtype == dtype for got in [*outputs, *grads.values()])
    errors = {"y": relative_error(outputs[0], layout.shard(expected))}
    if with_states:
        errors["final_state"] = relative_error(outputs[1], expected_final)
    for name, grad in grads.items():
        want = expected_grads[name]
        if name == "x":
            want = layout.shard(want)
        else:
            grad = grad.double()
            dist.all_reduce(grad)
        errors[f"d{name}"] = relative_error(grad, want, floor)
    return errors


@unwritten_memory_is_nan()
def worst_error(order: Order, documents_number: int, options: dict[str, Any]) -> tuple[float, str]:
    """The largest error over lengths and numbers of taps, and what it is of."""
    errors: dict[str, float] = {}
    for seq_len in LENGTHS:
        documents = documents_of(seq_len)[documents_number]
        for taps in (1, 2, 4, 7):
            found = errors_on_rank(seq_len, taps, documents, order, **options)
            errors |= {f"{name} of {seq_len} tokens, {taps} taps": error for name, error in found.items()}
    return worst_of(errors)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"with_bias": False, "activation": None},
    "bias and activation": {},
    "states": {"with_states": True},
}


# With a bias, or with states, it is the plain one and more.
@pytest.mark.slow_rows(r"^[23]-zigzag-.*-plain$")
@pytest.mark.slow_rows(r"^4-.*-(plain|bias and activation)$", r"^[23]-contiguous")
# Others of their kind run in make test.
@pytest.mark.slow_rows(
    r"^4-(zigzag|contiguous-one document)",
    r"^3-zigzag-(one document-states|packed-bias)",
    r"^2-zigzag-(one document-states|packed-bias)",
)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("documents_number", [0, 1], ids=["one document", "packed"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_every_rank_equals_the_definition_with_every_gradient(
    num_ranks: int, order: Order, documents_number: int, options: str
) -> None:
    for error, what in run_on_ranks(num_ranks, worst_error, order, documents_number, OPTIONS[options]):
        assert error < 1e-12, what


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^contiguous$")
@pytest.mark.parametrize("order", ORDERS)
def test_rows_of_a_batch_are_independent(order: Order) -> None:
    for options in ({"batch": 3}, {"batch": 3, "with_states": True}):
        for error, what in run_on_ranks(3, worst_error, order, 0, options):
            assert error < 1e-12, what


@pytest.mark.slow_rows(r"^contiguous")
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^zigzag-dtype0-")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("order", ORDERS)
def test_single_and_half_precision_stay_close_to_float64(order: Order, dtype: torch.dtype, tolerance: float) -> None:
    # Of four tokens a rank may have one, whose gradient is a sum of rounded terms of about 1 that cancel.
    rounded = {"dtype": dtype, "floor": 0.5 if dtype == torch.bfloat16 else 0.0}
    for options in (rounded, {**rounded, "with_states": True}):
        for documents_number in (0, 1):
            for error, what in run_on_ranks(3, worst_error, order, documents_number, options):
                assert error < tolerance, what


def prefill_then_decode() -> float:
    """A prompt over the ranks, the rest on one device."""
    given = inputs(40, 4, None)
    weight, bias = given["weight"], given["bias"]
    layout = SequenceLayout(30, order="zigzag")
    _, state = causal_conv1d(layout.shard(given["x"][:, :30]), weight, bias, "silu", layout, output_final_state=True)
    got = causal_conv1d(given["x"][:, 30:], weight, bias, "silu", initial_state=state)
    assert isinstance(got, Tensor)
    expected, _ = definition(given["x"], weight, bias, "silu", None, None)
    return relative_error(got, expected[:, 30:])


def test_a_prompt_is_read_over_ranks_and_continued_on_one() -> None:
    assert worst(run_on_ranks(3, prefill_then_decode)) < 1e-12


@unwritten_memory_is_nan()
def gradients_of_some(order: Order) -> list[float]:
    """Errors where only some inputs take a gradient, and where the graph is walked twice."""
    given = inputs(23, 4, None)
    layout = SequenceLayout(23, order=order)
    errors = []
    for wanted in (["x"], ["weight"], ["bias"], ["x", "bias"], ["weight", "bias"]):
        whole = {name: given[name].clone().requires_grad_(name in wanted) for name in ("x", "weight", "bias")}
        expected, _ = definition(whole["x"], whole["weight"], whole["bias"], "silu", None, None)
        expected_grads = torch.autograd.grad(expected, [whole[name] for name in wanted], given["grad_y"])
        own = {name: layout.shard(given[name]) if name == "x" else given[name] for name in whole}
        own = {name: tensor.clone().requires_grad_(name in wanted) for name, tensor in own.items()}
        y = causal_conv1d(own["x"], own["weight"], own["bias"], "silu", layout)
        assert isinstance(y, Tensor)
        for retain_graph in (True, False):
            leaves = [own[name] for name in wanted]
            grads = torch.autograd.grad(y, leaves, layout.shard(given["grad_y"]), retain_graph=retain_graph)
            for name, grad, want in zip(wanted, grads, expected_grads, strict=True):
                if name == "x":
                    want = layout.shard(want)
                else:
                    grad = grad.clone()
                    dist.all_reduce(grad)
                errors.append(relative_error(grad, want))
    return errors


@pytest.mark.parametrize("order", ORDERS)
def test_inputs_may_be_frozen_and_graphs_walked_twice_over_ranks(order: Order) -> None:
    for errors in run_on_ranks(3, gradients_of_some, order):
        assert worst(errors) < 1e-12


@unwritten_memory_is_nan()
def several_layers() -> float:
    """Convolutions of q, k and v side by side, then one of their sum: many messages between the same ranks."""
    given = inputs(40, 4, [0, 7, 19, 40])
    layout = SequenceLayout(40, order="zigzag", documents=[0, 7, 19, 40])

    def network(x: Tensor, weight: Tensor, on_ranks: bool) -> Tensor:
        def convolve(x: Tensor, weight: Tensor) -> Tensor:
            if not on_ranks:
                return definition(x, weight, None, "silu", [0, 7, 19, 40], None)[0]
            y = causal_conv1d(x, weight, None, "silu", layout)
            assert isinstance(y, Tensor)
            return y

        q, k, v = convolve(x, weight), convolve(2 * x, weight[:, :2]), convolve(-x, weight[:, 1:])
        return convolve(q * k + v, weight)

    whole, x = given["x"].clone().requires_grad_(), layout.shard(given["x"]).requires_grad_()
    expected, got = network(whole, given["weight"], False), network(x, given["weight"], True)
    (expected_grad,) = torch.autograd.grad(expected, whole, given["grad_y"])
    (grad,) = torch.autograd.grad(got, x, layout.shard(given["grad_y"]))
    return worst([relative_error(got, layout.shard(expected)), relative_error(grad, layout.shard(expected_grad))])


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_layers_side_by_side_and_on_top_of_each_other_do_not_mix(num_ranks: int) -> None:
    assert worst(run_on_ranks(num_ranks, several_layers)) < 1e-12


def order_of_events(name: str) -> list[str]:
    log: list[str] = []
    original, inside = halo.start_all_to_all, getattr(shift if name == "_Shift" else convolution, name)
    forward, backward = inside.forward, inside.backward

    def noted_start(*args: Any, **options: Any) -> Flight:
        log.append(f"{args[-1]} halo launched")
        flight = original(*args, **options)
        return replace(flight, work=NotedWork(flight.work, f"{args[-1]} halo", log))

    def noted(function: Any, direction: str) -> Any:
        def run(*args: Any) -> Any:
            log.append(f"inside {direction}")
            return function(*args)

        return staticmethod(run)

    layout = SequenceLayout(64)
    x = torch.randn(1, layout.num_local_tokens, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, 4, dtype=torch.float64, requires_grad=True)
    halo.start_all_to_all, inside.forward, inside.backward = (
        noted_start,
        noted(forward, "forward"),
        noted(backward, "backward"),
    )
    try:
        tokens = Noted.apply(x, "tokens", log)
        y = (
            token_shift(tokens, layout=layout)
            if name == "_Shift"
            else causal_conv1d(tokens, weight, None, "silu", layout)
        )
        Noted.apply(y, "output", log).sum().backward()
    finally:
        halo.start_all_to_all, inside.forward, inside.backward = original, staticmethod(forward), staticmethod(backward)
    return log


@pytest.mark.parametrize("name", ["_Inside", "_Shift"])
def test_the_pass_over_all_tokens_hides_the_halo_in_both_directions(name: str) -> None:
    for log in run_on_ranks(4, order_of_events, name):
        assert log == HIDDEN_HALO


def bytes_sent(seq_len: int, order: Order, taps: int, batch: int) -> list[int]:
    layout = SequenceLayout(seq_len, order=order)
    x = torch.randn(batch, layout.num_local_tokens, 8, requires_grad=True)
    with record_traffic() as traffic:
        y = token_shift(x, layout=layout) if taps == 0 else causal_conv1d(x, torch.randn(8, taps), None, "silu", layout)
        assert isinstance(y, Tensor)
        y.sum().backward()
    return [event.bytes_sent for event in traffic.events]


def test_bytes_do_not_grow_with_the_sequence() -> None:
    for taps, width in ((4, 3), (2, 1), (0, 1)):
        halo_bytes = 2 * width * 8 * 4
        for seq_len in (64, 6400):
            sent = run_on_ranks(4, bytes_sent, seq_len, "contiguous", taps, 2)
            assert sent == [[halo_bytes, 0], [halo_bytes] * 2, [halo_bytes] * 2, [0, halo_bytes]]
            sent = run_on_ranks(4, bytes_sent, seq_len, "zigzag", taps, 2)
            assert sent == [[halo_bytes] * 2, [2 * halo_bytes] * 2, [2 * halo_bytes] * 2, [halo_bytes] * 2]
    assert run_on_ranks(4, bytes_sent, 64, "zigzag", 1, 2) == [[]] * 4
    assert run_on_ranks(1, bytes_sent, 64, "zigzag", 4, 2) == [[]]


def test_inputs_that_do_not_fit_are_refused_with_the_way_out() -> None:
    x, weight, bias = torch.zeros(2, 8, 3), torch.zeros(3, 4), torch.zeros(3)
    cases: Iterator[tuple[str, type[Exception], tuple[Any, ...], dict[str, Any]]] = iter(
        [
            (r"takes x \[B, T, C\].*got shape \(2, 8\)", InputError, (x[..., 0], weight), {}),
            (r"at least one row, token and channel; got x of shape \(0, 8, 3\)", InputError, (x[:0], weight), {}),
            (
                r"x must be a floating-point tensor; got a Tensor of torch\.int64.*Convert",
                InputError,
                (x.long(), weight),
                {},
            ),
            (r"weight \[C, W\] with C = 3.*got \(5, 4\)", InputError, (x, torch.zeros(5, 4)), {}),
            (r"looks like \[W, C\]: transpose", InputError, (x, weight.t()), {}),
            (r"take weight\.squeeze\(1\)", InputError, (x, weight.unsqueeze(1)), {}),
            (r"W at least 1; got \(3, 0\)", InputError, (x, weight[:, :0]), {}),
            (r"bias \[C\] = \(3,\) or None; got \(4,\)", InputError, (x, weight, torch.zeros(4)), {}),
            (r"weight torch\.float64 on cpu\. Convert weight with weight\.to", InputError, (x, weight.double()), {}),
            (r"bias torch\.bfloat16 on cpu\. Convert bias", InputError, (x, weight, bias.bfloat16()), {}),
            (r"None or one of 'silu', 'swish'; got 'relu'", InputError, (x, weight, bias, "relu"), {}),
            (r"global number of tokens", LayoutError, (x, weight), {"layout": SequenceLayout.for_rank(8, 2, 0)}),
            (r"takes the 9 tokens.*got 8", LayoutError, (x, weight), {"layout": SequenceLayout.local(9)}),
            (r"made by for_rank", LayoutError, (x, weight), {"layout": SequenceLayout.for_rank(16, 2, 0)}),
            (r"B = 1, the packed", InputError, (x, weight), {"layout": SequenceLayout.local(8, [0, 3, 8])}),
            (
                r"\[B, W-1, C\] = \(2, 3, 3\).*got \(2, 4, 3\)",
                InputError,
                (x, weight),
                {"initial_state": torch.zeros(2, 4, 3)},
            ),
            (
                r"\[num_documents, W-1, C\] = \(2, 3, 3\).*got \(1, 3, 3\)",
                InputError,
                (x[:1], weight),
                {"initial_state": torch.zeros(1, 3, 3), "layout": SequenceLayout.local(8, [0, 3, 8])},
            ),
            (r"in torch\.float64", InputError, (x, weight), {"initial_state": torch.zeros(2, 3, 3).double()}),
        ]
    )
    for message, kind, args, options in cases:
        with pytest.raises(kind, match=message):
            causal_conv1d(*args, **options)


def global_tokens_on_ranks() -> None:
    causal_conv1d(torch.zeros(1, 8, 2), torch.zeros(2, 4), layout=SequenceLayout(8))


def test_tokens_that_were_not_sharded_are_refused_on_every_rank() -> None:
    for kind, message in run_on_ranks(2, raised, global_tokens_on_ranks):
        assert kind == "LayoutError" and "take layout.shard(x) first" in message
