"""Long convolutions over ranks equal direct ones on each, with every gradient; kernels, states, methods and refusals."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import longspan
from longspan import ExponentialKernel, FunctionKernel, InputError, LayoutError, SequenceLayout
from longspan.attention.long_convolution import taps as taps_module
from longspan.exchange import TOPOLOGIES, record_traffic
from longspan.layout import Order
from longspan.ops.long_convolution import exponentials, fourier
from tests.attention.long_convolution_reference import KINDS, Documents, definition, inputs
from tests.compare import relative_error, worst, worst_of
from tests.live_bytes import LiveBytes
from tests.ranks import raised, run_on_ranks
from tests.unwritten import unwritten_memory_is_nan

ORDERS: list[Order] = ["contiguous", "zigzag"]
# Short, one token for some ranks; and no multiple of anything. Of exponentials longer than a chunk for each of four ranks.
SHORT, LENGTH, LENGTH_OF_EXPONENTIALS = 5, 83, 301


def documents_of(seq_len: int) -> list[Documents]:
    """None; and boundaries on shards and inside them, with documents of one token and of several chunks."""
    return [None, sorted({0, 1, 2, seq_len // 3, seq_len // 2, seq_len // 2 + 2, seq_len - 1, seq_len})]


def summed(grad: Tensor) -> Tensor:
    """The sum of a replicated tensor's shares."""
    total = torch.view_as_real(grad).contiguous() if grad.is_complex() else grad.clone()
    dist.all_reduce(total)
    return torch.view_as_complex(total) if grad.is_complex() else total


def as_real(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x


def errors_on_rank(
    kind: str,
    seq_len: int,
    num_taps: int,
    documents: Documents,
    order: Order,
    *,
    with_states: bool = False,
    num_channels: int = 3,
    batch: int = 1,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> dict[str, float]:
    """Errors of this rank's outputs and gradients; those of replicated inputs are summed over the ranks."""
    given = inputs(kind, seq_len, num_taps, documents, num_channels, batch)
    names = [name for name in given if not name.startswith("grad") and (with_states or name != "initial_state")]
    # Of exponentials all but x stays in the dtype of the state.
    kept = {name for name in given if KINDS[kind].exponentials and name not in ("x", "grad_y")}
    dtypes = {name: torch.promote_types(dtype, torch.float32) if name in kept else dtype for name in given}
    dtypes |= {name: dtypes[name].to_complex() for name in kept if given[name].is_complex()}
    rounded = {name: x.to(dtypes[name]).to(x.dtype) for name, x in given.items()}

    whole = {name: rounded[name].clone().requires_grad_() for name in names}
    parameters = [name for name in names if name not in ("x", "initial_state")]
    want, want_final = definition(
        kind, whole["x"], {n: whole[n] for n in parameters}, num_taps, documents, whole.get("initial_state")
    )
    outputs, upstream = [want], [rounded["grad_y"]]
    if with_states:
        # Every rank weighs the final state its own way; its gradient is the sum over ranks.
        outputs.append(want_final)
        upstream.append(sum(range(1, dist.get_world_size() + 1)) * rounded["grad_final"])
    want_grads = dict(zip(names, torch.autograd.grad(outputs, list(whole.values()), upstream), strict=True))

    layout = SequenceLayout(seq_len, order=order, documents=documents)
    own = {name: layout.shard(rounded[name]) if name == "x" else rounded[name] for name in names}
    leaves = {name: x.detach().to(dtypes[name]).clone().requires_grad_() for name, x in own.items()}
    kernel = KINDS[kind].kernel({n: leaves[n] for n in parameters}, num_taps)
    options |= {"initial_state": leaves["initial_state"]} if with_states else {}
    found = longspan.long_conv1d(leaves["x"], kernel, output_final_state=with_states, layout=layout, **options)
    got = [found] if isinstance(found, Tensor) else list(found)
    own_upstream = [layout.shard(rounded["grad_y"]).to(got[0].dtype)]
    if with_states:
        own_upstream.append(((layout.rank + 1) * rounded["grad_final"]).to(got[1].dtype))
    grads = dict(zip(names, torch.autograd.grad(got, list(leaves.values()), own_upstream), strict=True))

    assert got[0].dtype == dtype and all(grads[name].dtype == leaves[name].dtype for name in names)
    errors = {"y": relative_error(got[0], layout.shard(want))}
    if with_states:
        errors["final_state"] = relative_error(as_real(got[1]), as_real(want_final))
    for name, grad in grads.items():
        expected = want_grads[name]
        grad, expected = (grad, layout.shard(expected)) if name == "x" else (summed(grad), expected)
        errors[f"d{name}"] = relative_error(as_real(grad), as_real(expected))
    return errors


@unwritten_memory_is_nan()
def worst_error(kind: str, order: Order, documents_number: int, options: dict[str, Any]) -> tuple[float, str]:
    """The largest error over lengths, numbers of taps and methods, and what it is of."""
    errors: dict[str, float] = {}
    # Small tiles, transforms and blocks of channels, so that there are several of each.
    settings = [(fourier, "_TILE", 16), (fourier, "_NUMBERS_CPU", 400), (exponentials, "_NUMBERS", 200)]
    settings.append((taps_module, "MOST_DIRECT_TAPS", 3))
    before = [(module, name, getattr(module, name)) for module, name, _ in settings]
    for module, name, value in settings:
        setattr(module, name, value)
    try:
        recurs = KINDS[kind].exponentials
        for seq_len in (SHORT, LENGTH_OF_EXPONENTIALS if recurs else LENGTH):
            documents = documents_of(seq_len)[documents_number]
            cases: list[tuple[int, dict[str, Any]]] = [(4, {})]
            if not recurs:
                taps = (1, 5) if seq_len == SHORT else (2, 9, LENGTH)
                cases = [(num, {"method": method}) for num in taps for method in ("halo", "all_to_all")]
            for num_taps, method in cases:
                found = errors_on_rank(kind, seq_len, num_taps, documents, order, **method, **options)
                errors |= {f"{name} of {seq_len}, {num_taps} {method}": error for name, error in found.items()}
    finally:
        for module, name, value in before:
            setattr(module, name, value)
    return worst_of(errors)


QUICK = {(1, "contiguous", 1), (2, "zigzag", 0), (4, "contiguous", 1)}


# On two ranks all kinds; on four those whose state travels.
@pytest.mark.slow_rows(r"^4-contiguous-1-(taps|function)$")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("num_ranks", "order", "documents_number"),
    [
        pytest.param(num_ranks, order, number, marks=() if (num_ranks, order, number) in QUICK else pytest.mark.slow)
        for num_ranks in (1, 2, 3, 4)
        for order in ORDERS
        for number in (0, 1)
    ],
)
def test_every_rank_equals_the_definition_with_every_gradient(
    num_ranks: int, order: Order, documents_number: int, kind: str
) -> None:
    for error, what in run_on_ranks(num_ranks, worst_error, kind, order, documents_number, {"with_states": True}):
        assert error < 1e-11, what


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^function$")
@pytest.mark.parametrize("kind", KINDS)
def test_without_states_and_with_fewer_channels_than_ranks(kind: str) -> None:
    for options in ({"batch": 2, "num_channels": 5}, {"num_channels": 1}):
        for error, what in run_on_ranks(3, worst_error, kind, "zigzag", 0, options):
            assert error < 1e-11, what


@unwritten_memory_is_nan()
def error_by(exchange: str, kind: str, order: Order, documents: Documents) -> tuple[float, str]:
    return worst_of(errors_on_rank(kind, 301, 1, documents, order, with_states=True, batch=1, exchange=exchange))


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^two_level-exponentials$", r"^ring-complex exponentials$")
@pytest.mark.parametrize("kind", ["exponentials", "complex exponentials"])
@pytest.mark.parametrize(
    "exchange",
    [name if name in ("ring", "two_level") else pytest.param(name, marks=pytest.mark.slow) for name in TOPOLOGIES],
)
def test_the_state_of_exponentials_travels_by_every_topology(exchange: str, kind: str) -> None:
    # Between neighbours where no document spans more than two ranks' segments.
    fitting = [[*range(0, 301, 20), 301]] if exchange == "neighbour" else documents_of(301)
    for documents in fitting:
        for error, what in run_on_ranks(4, error_by, exchange, kind, "zigzag", documents):
            assert error < 1e-11, what


TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def error_in(dtype: torch.dtype, kind: str) -> tuple[float, str]:
    errors: dict[str, float] = {}
    for num_taps, method in ((9, "halo"), (90, "halo"), (90, "all_to_all")):
        options: dict[str, Any] = {} if KINDS[kind].exponentials else {"method": method}
        found = errors_on_rank(kind, 150, num_taps, None, "zigzag", with_states=True, dtype=dtype, **options)
        errors |= {f"{name}, {num_taps} taps by {method}": error for name, error in found.items()}
    return worst_of(errors)


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^dtype0-(complex exponentials|taps)$", r"^dtype1-(exponentials|function)$")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_single_and_half_precision_stay_close_to_float64(dtype: torch.dtype, kind: str) -> None:
    for error, what in run_on_ranks(2, error_in, dtype, kind):
        assert error < TOLERANCES[dtype], what


def test_exponents_near_zero_keep_their_digits_over_a_long_sequence() -> None:
    """A mode that turns by two radians a token, undamped: its phase after 20,000 tokens is right in float32."""
    length = 20_000
    log_decay = torch.complex(torch.tensor([[-1e-5]]), torch.tensor([[2.0]]))
    coefficients = torch.ones(1, 1, dtype=torch.complex64)
    x = torch.zeros(1, length, 1)
    x[0, 0] = 1.0
    got = longspan.long_conv1d(x, ExponentialKernel(log_decay, coefficients))[0, -1, 0]
    want = (log_decay.to(torch.complex128) * (length - 1)).exp().real
    assert abs(float(got) - float(want)) < 2e-4


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_is_continued_token_by_token(kind: str) -> None:
    seq_len, num_taps = 70, 50
    given = inputs(kind, seq_len, num_taps, None, 3, 2)
    parameters = {name: x for name, x in given.items() if name not in ("x", "initial_state", "grad_y", "grad_final")}
    want, want_final = definition(kind, given["x"], parameters, num_taps, None, given["initial_state"])
    kernel = KINDS[kind].kernel(parameters, num_taps)
    parts, state = [], given["initial_state"]
    # The kernel is longer than most of these: what it reaches is in the state.
    for start, stop in ((0, 55), (55, 62), (62, 63), (63, 64), *((t, t + 1) for t in range(64, seq_len))):
        y, state = longspan.long_conv1d(given["x"][:, start:stop], kernel, initial_state=state, output_final_state=True)
        parts.append(y)
    assert relative_error(torch.cat(parts, 1), want) < 1e-12
    assert relative_error(as_real(state), as_real(want_final)) < 1e-12


def errors_of_stretches(kind: str, order: Order, method: str) -> dict[str, float]:
    """A sequence in stretches, each given the state that the one before it left; documents span them or begin on their bounds."""
    cuts, documents = (0, 9, 30, 33, 60), [0, 4, 9, 40, 60]
    given = inputs(kind, cuts[-1], 6, documents, 3, 1)
    parameters = {name: x for name, x in given.items() if name not in ("x", "initial_state", "grad_y", "grad_final")}
    whole, first = given["x"].clone().requires_grad_(), given["initial_state"][:1].clone().requires_grad_()
    # Of several documents the first alone goes on from a state, and the last one's is left.
    states = torch.cat([first, torch.zeros_like(given["initial_state"][1:])])
    want, finals = definition(kind, whole, parameters, 6, documents, states)
    upstream = given["grad_y"], given["grad_final"][-1:]
    weight = sum(range(1, dist.get_world_size() + 1))
    want_grads = torch.autograd.grad([want, finals[-1:]], [whole, first], [upstream[0], weight * upstream[1]])

    layouts = SequenceLayout(cuts[-1], order=order, documents=documents, continues=7)
    parts = [(start, stop, layouts.stretch(start, stop)) for start, stop in pairwise(cuts)]
    options: dict[str, Any] = {} if KINDS[kind].exponentials else {"method": method}
    own_x = [layout.shard(given["x"][:, start:stop]).clone().requires_grad_() for start, stop, layout in parts]
    own_first = given["initial_state"][:1].clone().requires_grad_()
    outputs, state = [], own_first
    for x, (_, _, layout) in zip(own_x, parts, strict=True):
        kernel = KINDS[kind].kernel(parameters, 6)
        y, state = longspan.long_conv1d(
            x, kernel, initial_state=state, output_final_state=True, layout=layout, **options
        )
        outputs.append(y)
    own_upstream = [layout.shard(upstream[0][:, start:stop]) for start, stop, layout in parts]
    *grads, grad_first = torch.autograd.grad(
        [*outputs, state], [*own_x, own_first], [*own_upstream, (dist.get_rank() + 1) * upstream[1]]
    )
    errors = {"final": relative_error(as_real(state), as_real(finals[-1:]))}
    errors["dfirst"] = relative_error(as_real(summed(grad_first)), as_real(want_grads[1]))
    for (start, stop, layout), y, grad in zip(parts, outputs, grads, strict=True):
        errors[f"y from {start}"] = relative_error(y, layout.shard(want[:, start:stop]))
        errors[f"dx from {start}"] = relative_error(grad, layout.shard(want_grads[0][:, start:stop]), 1e-3)
    return errors


@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize(
    ("kind", "method"), [("taps", "halo"), ("taps", "all_to_all"), ("exponentials", ""), ("complex exponentials", "")]
)
def test_a_sequence_in_stretches_equals_one_call(kind: str, method: str, num_ranks: int) -> None:
    for errors in run_on_ranks(num_ranks, errors_of_stretches, kind, "zigzag", method):
        assert worst(errors) < 1e-11, errors


def test_taps_of_exponentials_are_those_of_the_recurrence() -> None:
    for kind in ("exponentials", "complex exponentials"):
        given = inputs(kind, 60, 1, None, 3, 2)
        kernel = ExponentialKernel(given["log_decay"], given["coefficients"])
        want = longspan.long_conv1d(given["x"], kernel)
        assert relative_error(longspan.long_conv1d(given["x"], kernel.taps(60)), want) < 1e-12


def test_the_weight_of_a_short_convolution_is_the_kernel_reversed() -> None:
    given = inputs("taps", 60, 5, None, 3, 2)
    want = longspan.causal_conv1d(given["x"], given["taps"].flip(1))
    assert torch.equal(longspan.long_conv1d(given["x"], given["taps"]), want)


def gradients_of_some(kind: str, method: str, order: Order) -> list[float]:
    """Errors where only some inputs take a gradient, and where the graph is walked twice."""
    given = inputs(kind, 40, 35, None, 3, 1)
    layout = SequenceLayout(40, order=order)
    parameters = [name for name in given if name not in ("x", "initial_state", "grad_y", "grad_final")]
    options: dict[str, Any] = {} if KINDS[kind].exponentials else {"method": method}
    errors = []
    for wanted in (["x"], parameters, [*parameters[:1], "x"]):
        whole = {name: given[name].clone().requires_grad_(name in wanted) for name in ("x", *parameters)}
        want, _ = definition(kind, whole["x"], whole, 35, None, None)
        want_grads = torch.autograd.grad(want, [whole[name] for name in wanted], given["grad_y"])
        own = {name: (layout.shard(x) if name == "x" else x).detach().clone() for name, x in whole.items()}
        own = {name: x.requires_grad_(name in wanted) for name, x in own.items()}
        y = longspan.long_conv1d(own["x"], KINDS[kind].kernel(own, 35), layout=layout, **options)
        for retain_graph in (True, False):
            leaves = [own[name] for name in wanted]
            grads = torch.autograd.grad(y, leaves, layout.shard(given["grad_y"]), retain_graph=retain_graph)
            for name, grad, expected in zip(wanted, grads, want_grads, strict=True):
                got, want = (grad, layout.shard(expected)) if name == "x" else (summed(grad), expected)
                errors.append(relative_error(as_real(got), as_real(want)))
    y = longspan.long_conv1d(layout.shard(given["x"]), KINDS[kind].kernel(given, 35), layout=layout, **options)
    assert not y.requires_grad
    return errors


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("taps", "halo"),
        ("taps", "all_to_all"),
        ("function", "all_to_all"),
        ("exponentials", ""),
        ("complex exponentials", ""),
    ],
)
def test_inputs_may_be_frozen_and_graphs_walked_twice_over_ranks(kind: str, method: str) -> None:
    for errors in run_on_ranks(3, gradients_of_some, kind, method, "zigzag"):
        assert worst(errors) < 1e-11


def losses_of_some_outputs(kind: str, method: str) -> list[float]:
    """Gradients of x where rank 0's loss takes y alone, and rank 1's the final state alone."""
    given = inputs(kind, 50, 40, None, 3, 1)
    parameters = {name: x for name, x in given.items() if name not in ("x", "initial_state", "grad_y", "grad_final")}
    layout = SequenceLayout(50)
    options: dict[str, Any] = {} if KINDS[kind].exponentials else {"method": method}
    whole, own = given["x"].clone().requires_grad_(), layout.shard(given["x"]).clone().requires_grad_()
    want, want_final = definition(kind, whole, parameters, 40, None, None)
    own_share = torch.zeros_like(given["grad_y"])
    start, stop = layout.segments_of(0)[0]
    own_share[:, start:stop] = given["grad_y"][:, start:stop]
    (expected,) = torch.autograd.grad([want, want_final], whole, [own_share, given["grad_final"]])
    kernel = KINDS[kind].kernel(parameters, 40)
    y, final = longspan.long_conv1d(own, kernel, layout=layout, output_final_state=True, **options)
    out, upstream = (y, layout.shard(given["grad_y"])) if layout.rank == 0 else (final, given["grad_final"])
    (grad,) = torch.autograd.grad(out, own, upstream)
    return [relative_error(grad, layout.shard(expected))]


@pytest.mark.parametrize(
    ("kind", "method"), [("taps", "halo"), ("taps", "all_to_all"), ("exponentials", ""), ("complex exponentials", "")]
)
def test_ranks_may_take_the_output_or_the_final_state_into_their_losses(kind: str, method: str) -> None:
    for errors in run_on_ranks(2, losses_of_some_outputs, kind, method):
        assert worst(errors) < 1e-11


def most_over_x(kind: str, seq_len: int, num_channels: int = 64) -> float:
    """The most bytes of forward and backward over those of x; x, the kernel and the gradient of y are not counted."""
    given = inputs(kind, seq_len, seq_len, None, num_channels, 1)
    own = {name: x.to(torch.complex64 if x.is_complex() else torch.float32) for name, x in given.items()}
    leaves = {name: x.requires_grad_() for name, x in own.items() if name in ("x", *KINDS[kind].parameters(1, 1))}
    kernel = KINDS[kind].kernel(leaves, seq_len)
    with LiveBytes() as live:
        longspan.long_conv1d(leaves["x"], kernel).backward(own["grad_y"])
    return live.most / (4 * leaves["x"].numel())


# As docs/long_convolutions.md says of tensors, for long sequences, where a block of channels is small beside all.
MOST_OVER_X = {"taps": 4.1, "exponentials": 5.5}


@pytest.mark.parametrize("kind", MOST_OVER_X)
def test_memory_is_linear_with_the_stated_factor(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fourier, "_NUMBERS_CPU", 1 << 14)
    monkeypatch.setattr(exponentials, "_NUMBERS", 1 << 14)
    short, long = most_over_x(kind, 1024), most_over_x(kind, 4096)
    assert long < 1.05 * short and long < MOST_OVER_X[kind], (short, long)


def final_states(kind: str) -> Tensor:
    given = inputs(kind, 97, 60, None, 3, 2)
    layout = SequenceLayout(97, order="zigzag")
    kernel = KINDS[kind].kernel(given, 60)
    x = layout.shard(given["x"]).float()
    kernel = kernel.float() if isinstance(kernel, Tensor) else kernel
    _, final = longspan.long_conv1d(x, kernel, layout=layout, output_final_state=True)
    return as_real(final)


@pytest.mark.parametrize("kind", ["taps", "exponentials", "complex exponentials"])
def test_final_states_are_the_same_bits_on_every_rank(kind: str) -> None:
    first, *others = run_on_ranks(3, final_states, kind)
    assert all(torch.equal(first, other) for other in others)


def traffic(kind: str, num_taps: int, method: str, documents: Documents) -> list[tuple[str, int]]:
    given = inputs(kind, 64, num_taps, documents, 8, 1)
    layout = SequenceLayout(64, documents=documents)
    x = layout.shard(given["x"]).float().requires_grad_()
    parameters = {name: x for name, x in given.items() if name not in ("x", "initial_state", "grad_y", "grad_final")}
    kernel = KINDS[kind].kernel({n: p.float() if not p.is_complex() else p for n, p in parameters.items()}, num_taps)
    options: dict[str, Any] = {"exchange": method} if KINDS[kind].exponentials else {"method": method}
    with record_traffic() as found:
        longspan.long_conv1d(x, kernel, layout=layout, **options).sum().backward()
    return [(event.name, event.bytes_sent) for event in found.events]


def test_what_is_sent_is_the_halo_or_the_share_of_channels_or_the_state() -> None:
    # Of 64 tokens, 8 channels and 4 ranks; 4 bytes a number; forward and backward.
    halo = run_on_ranks(4, traffic, "taps", 5, "auto", None)
    assert halo[1] == [("halo", 4 * 8 * 4)] * 2
    channels = run_on_ranks(4, traffic, "taps", 64, "auto", None)
    assert channels == [[("long_conv1d", 16 * 6 * 4)] * 4] * 4
    state = run_on_ranks(4, traffic, "exponentials", 1, "ring", None)
    assert [event for event in state[1] if event[1]] == [("ring", 8 * 4 * 4)] * 2
    # e^{length · exponent} is nothing that a rank must be told: of a complex number two numbers, and no more.
    for kind, numbers in (("exponentials", 4), ("complex exponentials", 2 * 3)):
        gathered = run_on_ranks(4, traffic, kind, 1, "all_gather", None)
        assert gathered == [[("all_gather", 3 * 8 * numbers * 4)] * 2] * 4
    # No document spans ranks.
    assert run_on_ranks(4, traffic, "taps", 64, "auto", [0, 16, 32, 48, 64]) == [[]] * 4


def asked_channels(num_channels: int) -> list[tuple[int, range]]:
    asked = []

    def function(lags: Tensor, channels: range) -> Tensor:
        asked.append((len(lags), channels))
        return torch.ones(len(channels), len(lags))

    layout = SequenceLayout(40)
    x = torch.ones(1, layout.num_local_tokens, num_channels)
    longspan.long_conv1d(x, FunctionKernel(function), layout=layout, method="all_to_all")
    longspan.long_conv1d(x, FunctionKernel(function, 12), layout=layout, method="halo")
    return asked


def test_a_function_is_asked_for_the_channels_that_a_rank_convolves() -> None:
    of_ranks = run_on_ranks(3, asked_channels, 7)
    assert of_ranks == [[(40, share), (12, range(7))] for share in (range(2), range(2, 4), range(4, 7))]


X, TAPS = torch.zeros(2, 8, 3), torch.zeros(3, 4)
A, C = -torch.ones(3, 2), torch.ones(3, 2)


def _wrong_function(lags: Tensor, channels: range) -> Tensor:
    return torch.zeros(len(lags), len(channels))


@pytest.mark.parametrize(
    ("message", "kernel", "options"),
    [
        (r"at most as many taps as the sequence has tokens, 8; got a kernel of 9.*Cut it", torch.zeros(3, 9), {}),
        (r"8; got a kernel of 9.*no more lags than that, num_taps=seq_len", FunctionKernel(_wrong_function, 9), {}),
        (r"kernel \[C, K\] with C = 3.*got \(5, 4\)", torch.zeros(5, 4), {}),
        (r"got \(4, 3\)\. It looks like \[K, C\]: transpose", TAPS.t(), {}),
        (r"K at least 1; got \(3, 0\)", TAPS[:, :0], {}),
        (r"kernel of torch\.float64 on cpu\. Convert it with kernel\.to", TAPS.double(), {}),
        (r"kernel must be a floating-point tensor", TAPS.long(), {}),
        (r"got <function.*Wrap a function as longspan\.FunctionKernel", _wrong_function, {}),
        (r"must return taps \[channels, lags\] = \(3, 4\).*got \(4, 3\)", FunctionKernel(_wrong_function, 4), {}),
        (r"must be callable.*got 3", FunctionKernel(3), {}),  # type: ignore[arg-type]
        (r"num_taps must be a positive int.*got 0", FunctionKernel(_wrong_function, 0), {}),
        (r"FunctionKernel without num_taps", FunctionKernel(_wrong_function), {"output_final_state": True}),
        (r"real part of at most 0.*its largest is 1", ExponentialKernel(-A, C), {}),
        (r"its largest is nan", ExponentialKernel(A * torch.nan, C), {}),
        (r"largest is 0\.5", ExponentialKernel(torch.complex(-A, A) / 2, torch.complex(C, C)), {}),
        (r"one shape, and both be real or both complex", ExponentialKernel(A, C[:, :1]), {}),
        (r"both complex", ExponentialKernel(torch.complex(A, A), C), {}),
        (r"coefficients.*\[C, N\] with C = 3.*Expand", ExponentialKernel(A, C[:2]), {}),
        (r"log_decay must be a torch\.Tensor; got 0\.5", ExponentialKernel(0.5, C), {}),  # type: ignore[arg-type]
        (r"at least one channel and exponential", ExponentialKernel(A[:, :0], C[:, :0]), {}),
        (r"method is for taps and functions; got method='halo'", ExponentialKernel(A, C), {"method": "halo"}),
        (r"exchange is for exponentials.*got exchange='ring'", TAPS, {"exchange": "ring"}),
        (r"method must be.*got 'pigeon'", TAPS, {"method": "pigeon"}),
        (r"exchange must be.*got 'pigeon'", ExponentialKernel(A, C), {"exchange": "pigeon"}),
        (r"output_final_state must be True or False; got 1", TAPS, {"output_final_state": 1}),
        (r"\[B, K-1, C\] = \(2, 3, 3\).*got \(2, 4, 3\)", TAPS, {"initial_state": torch.zeros(2, 4, 3)}),
        (
            r"its state, \[B, C, N\] = \(2, 3, 2\) in torch\.float32.*output_final_state=True returns",
            ExponentialKernel(A, C),
            {"initial_state": torch.zeros(2, 3, 2).double()},
        ),
        (
            r"in torch\.complex64",
            ExponentialKernel(torch.complex(A, A), torch.complex(C, C)),
            {"initial_state": torch.zeros(2, 3, 2)},
        ),
        (r"initial_state must be a torch\.Tensor", ExponentialKernel(A, C), {"initial_state": 0.0}),
    ],
)
def test_what_does_not_fit_is_refused_with_the_way_out(message: str, kernel: Any, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=message):
        longspan.long_conv1d(X, kernel, **options)


def test_a_layout_that_does_not_fit_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"takes the 9 tokens.*got 8"):
        longspan.long_conv1d(X, TAPS, layout=SequenceLayout.local(9))
    with pytest.raises(InputError, match=r"B = 1, the packed"):
        longspan.long_conv1d(X, TAPS, layout=SequenceLayout.local(8, [0, 3, 8]))
    with pytest.raises(LayoutError, match="made by for_rank"):
        longspan.long_conv1d(X, TAPS, layout=SequenceLayout.for_rank(16, 2, 0))


def too_long_on_ranks() -> list[str]:
    layout = SequenceLayout(8)
    x = torch.zeros(1, layout.num_local_tokens, 3)
    kernels = (torch.zeros(3, 9), ExponentialKernel(-A, C))
    return [raised(longspan.long_conv1d, x, kernel)[0] for kernel in kernels for _ in range(2)] + [
        raised(lambda: longspan.long_conv1d(x, kernels[0], layout=layout))[1]
    ]


def test_a_kernel_longer_than_the_sequence_is_refused_on_every_rank() -> None:
    for found in run_on_ranks(2, too_long_on_ranks):
        assert found[:-1] == ["InputError"] * 4
        assert "as the sequence has tokens, 8; got a kernel of 9" in found[-1]


def under_autocast(kind: str) -> list[float]:
    given = inputs(kind, 90, 60, None, 3, 1)
    layout = SequenceLayout(90, order="zigzag")
    parameters = {n: x for n, x in given.items() if n not in ("x", "initial_state", "grad_y", "grad_final")}
    parameters = {n: x if x.is_complex() else x.float() for n, x in parameters.items()}
    kernel, x = KINDS[kind].kernel(parameters, 60), layout.shard(given["x"]).float()
    with torch.autocast("cpu", torch.bfloat16):
        got = longspan.long_conv1d(x, kernel, layout=layout)
    want = longspan.long_conv1d(x.bfloat16(), kernel, layout=layout)
    assert got.dtype == torch.bfloat16
    return [0.0 if torch.equal(got, want) else 1.0]


@pytest.mark.parametrize("kind", ["taps", "exponentials", "complex exponentials"])
def test_autocast_casts_the_tokens_and_no_kernel(kind: str) -> None:
    assert run_on_ranks(2, under_autocast, kind) == [[0.0]] * 2


def test_the_page_runs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "long_convolutions.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    found: dict[str, Any] = {}
    exec(code, found)
    assert found["y"].shape == (2, 1000, 8) and found["state"].shape == (2, 8, 16)
