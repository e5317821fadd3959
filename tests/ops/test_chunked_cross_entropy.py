"""The loss in chunks equals PyTorch's in float64, with every gradient, and never holds the logits of all tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import longspan
from longspan import SequenceLayout
from longspan.ops.chunked.cross_entropy import CHUNK_BYTES, chunk_size_of
from longspan.ops.chunked.sums import times_number
from tests.compare import relative_error, worst
from tests.ranks import run_on_ranks
from tests.unwritten import unwritten_memory_is_nan

SHAPE, WIDTH, WORDS = (3, 37), 16, 29
NUM_TOKENS = 111
UPSTREAM = -2.7

Inputs = tuple[Tensor, Tensor, Tensor]
"""Hidden, weight and bias."""


def make(dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = SHAPE) -> tuple[Inputs, Tensor]:
    """Inputs that require gradients; labels, of which two of seven are ignored."""
    generator = torch.Generator().manual_seed(3)

    def leaf(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    inputs = leaf(*shape, WIDTH), leaf(WORDS, WIDTH), leaf(WORDS)
    labels = torch.randint(WORDS, shape, generator=generator)
    order = torch.arange(labels.numel()).view(shape)
    return inputs, labels.masked_fill(order % 7 < 2, -100)


def in_float64(inputs: Inputs) -> Inputs:
    hidden, weight, bias = (x.detach().double().requires_grad_() for x in inputs)
    return hidden, weight, bias


def plain(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, softcap: float | None = None, **options: Any
) -> Tensor:
    """The definition: all logits, and PyTorch's loss."""
    logits = F.linear(hidden, weight, bias).flatten(0, -2)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, labels.flatten(), **options)


def with_gradients(loss: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    assert loss.dim() == 0
    return [loss.detach(), *torch.autograd.grad(loss * UPSTREAM, inputs)]


def errors(got: Sequence[Tensor], want: Sequence[Tensor]) -> list[float]:
    return [relative_error(x, y) for x, y in zip(got, want, strict=True)]


@pytest.mark.parametrize("chunk_size", [None, 1, 10, NUM_TOKENS, 500])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_bias", [True, False])
@unwritten_memory_is_nan()
def test_loss_and_gradients_are_those_of_all_logits(
    with_bias: bool, softcap: float | None, chunk_size: int | None
) -> None:
    (hidden, weight, bias), labels = make()
    inputs = (hidden, weight, bias)[: 3 if with_bias else 2]
    given = bias if with_bias else None
    got = longspan.chunked_cross_entropy(hidden, weight, labels, bias=given, softcap=softcap, chunk_size=chunk_size)
    want = plain(hidden, weight, given, labels, softcap)
    assert worst(errors(with_gradients(got, inputs), with_gradients(want, inputs))) < 1e-13


# Of gradients beside float64; narrow dtypes round logits and what is multiplied.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_other_dtypes_are_computed_in_float32_between_products(dtype: torch.dtype) -> None:
    inputs, labels = make(dtype)
    exact = in_float64(inputs)
    want = with_gradients(plain(*exact, labels), exact)
    loss = longspan.chunked_cross_entropy(*inputs[:2], labels, bias=inputs[2], chunk_size=10)
    got = with_gradients(loss, inputs)
    assert loss.dtype == torch.float32
    assert [x.dtype for x in got[1:]] == [dtype] * 3
    assert worst(errors(got, want)) < TOLERANCE[dtype]


def test_sums_over_many_chunks_do_not_round_to_bfloat16() -> None:
    inputs, labels = make(torch.bfloat16, (4000,))
    exact = in_float64(inputs)
    want = with_gradients(plain(*exact, labels), exact)
    one, many = (
        errors(
            with_gradients(
                longspan.chunked_cross_entropy(*inputs[:2], labels, bias=inputs[2], chunk_size=size), inputs
            ),
            want,
        )
        for size in (4000, 8)
    )
    assert worst(many[2:]) < 1.5 * worst(one[2:])


def test_gradients_of_float16_do_not_vanish_in_the_number_of_tokens() -> None:
    inputs, labels = make(torch.float16)
    exact = in_float64(inputs)
    scale, num_valid = 2.0**24, 10**9
    want = torch.autograd.grad(plain(*exact, labels, reduction="sum") * (scale / num_valid), exact)
    loss = longspan.chunked_cross_entropy(*inputs[:2], labels, bias=inputs[2], num_valid=num_valid)
    got = torch.autograd.grad(loss * scale, inputs)
    assert worst(errors(list(got), list(want))) < TOLERANCE[torch.float16]


def test_narrow_gradients_are_scaled_by_the_number_that_arrives_and_not_by_its_rounding() -> None:
    x, number = torch.linspace(1, 2, 1000).bfloat16().view(10, 100), torch.tensor(1.3)
    assert number.bfloat16() != number
    assert torch.equal(times_number(x, number, 3), (x.float() * number).bfloat16())


def test_autocast_casts_what_is_multiplied_and_leaves_the_sums() -> None:
    inputs, labels = make(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = longspan.chunked_cross_entropy(*inputs[:2], labels, bias=inputs[2], chunk_size=10)
        expected = plain(*inputs, labels)
    got, want = with_gradients(loss, inputs), with_gradients(expected, inputs)
    assert [x.dtype for x in got] == [torch.float32] * 4
    assert worst(errors(got, want)) < TOLERANCE[torch.bfloat16]
    # The products were those of bfloat16: the loss is that of PyTorch under autocast to the last digits of float32.
    assert relative_error(loss, expected) < 1e-6 < relative_error(loss, plain(*inputs, labels))


@pytest.mark.parametrize("ignore_index", [-100, 0, 5, -1])
def test_any_label_may_be_the_ignored_one(ignore_index: int) -> None:
    inputs, labels = make()
    labels = labels.masked_fill(labels == -100, ignore_index)
    want = with_gradients(plain(*inputs, labels, ignore_index=ignore_index), inputs)
    loss = longspan.chunked_cross_entropy(*inputs[:2], labels, bias=inputs[2], ignore_index=ignore_index, chunk_size=10)
    assert worst(errors(with_gradients(loss, inputs), want)) < 1e-13


@pytest.mark.parametrize("num_valid", [None, 0, torch.tensor(0), 1000])
def test_where_all_labels_are_ignored_loss_and_gradients_are_zero(num_valid: Any) -> None:
    inputs, labels = make()
    loss = longspan.chunked_cross_entropy(
        *inputs[:2], torch.full_like(labels, -100), bias=inputs[2], num_valid=num_valid, chunk_size=10, softcap=2.0
    )
    assert all(torch.equal(x, torch.zeros_like(x)) for x in with_gradients(loss, inputs))


def test_what_ignored_tokens_hold_does_not_reach_the_others_logits() -> None:
    """Their loss and their own gradient are zero even where their logits are not finite, as with all logits."""
    (hidden, weight, _), labels = make()
    with torch.no_grad():
        hidden[labels == -100] = float("inf")
    loss = longspan.chunked_cross_entropy(hidden, weight, labels, chunk_size=10)
    (grad,) = torch.autograd.grad(loss, hidden)
    assert loss.isfinite()
    assert torch.equal(grad[labels == -100], torch.zeros_like(grad[labels == -100]))
    assert grad.isfinite().all()


@pytest.mark.parametrize("num_valid", [1, 1234, torch.tensor(1234), torch.tensor(1234.0)])
def test_the_sum_is_divided_by_what_is_said(num_valid: Any) -> None:
    inputs, labels = make()
    want = with_gradients(plain(*inputs, labels, reduction="sum") / float(num_valid), inputs)
    loss = longspan.chunked_cross_entropy(*inputs[:2], labels, bias=inputs[2], num_valid=num_valid, chunk_size=10)
    assert worst(errors(with_gradients(loss, inputs), want)) < 1e-13


def test_a_tied_weight_gets_the_sum_of_both_gradients_once() -> None:
    (_, weight, _), labels = make()
    tokens = torch.arange(NUM_TOKENS).view(SHAPE) % WORDS
    (got,) = torch.autograd.grad(
        longspan.chunked_cross_entropy(weight[tokens].tanh(), weight, labels, chunk_size=10), weight
    )
    (want,) = torch.autograd.grad(plain(weight[tokens].tanh(), weight, None, labels), weight)
    assert relative_error(got, want) < 1e-13


class Seen(TorchDispatchMode):
    """How many products were made, and the number of elements of the largest tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0
        self.largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        self.products += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        if isinstance(out, Tensor):
            self.largest = max(self.largest, out.numel())
        return out


@pytest.mark.parametrize("needed", [(), (0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)], ids=str)
def test_gradients_are_made_for_what_requires_one_and_nothing_else(needed: tuple[int, ...]) -> None:
    inputs, labels = make()
    for index, x in enumerate(inputs):
        x.requires_grad_(index in needed)
    wanted = [inputs[index] for index in needed]
    with Seen() as seen:
        loss = longspan.chunked_cross_entropy(*inputs[:2], labels, bias=inputs[2], chunk_size=10)
        assert loss.requires_grad == bool(needed)
        if needed:
            got = with_gradients(loss, wanted)
    # Of logits, and one more for hidden and for weight each.
    assert seen.products == 12 * (1 + (0 in needed) + (1 in needed))
    if needed:
        assert worst(errors(got, with_gradients(plain(*inputs, labels), wanted))) < 1e-13


def test_without_gradients_a_chunk_takes_one_product() -> None:
    inputs, labels = make()
    with torch.no_grad(), Seen() as seen:
        loss = longspan.chunked_cross_entropy(*inputs[:2], labels, bias=inputs[2], chunk_size=10)
    assert seen.products == 12
    assert relative_error(loss, plain(*inputs, labels)) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_tensor_has_the_logits_of_all_tokens(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1500, 2, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(400, 2, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(400, (1500,), generator=generator)
    with Seen() as seen:
        longspan.chunked_cross_entropy(hidden, weight, labels, chunk_size=16, softcap=5.0).backward()
    assert seen.largest == 16 * 400
    assert hidden.grad is not None and weight.grad is not None


def test_a_graph_that_is_kept_gives_the_same_again() -> None:
    inputs, labels = make()
    loss = longspan.chunked_cross_entropy(*inputs[:2], labels, bias=inputs[2], chunk_size=10)
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    second = torch.autograd.grad(loss * 3.0, inputs)
    assert worst(errors(list(second), [3.0 * x for x in first])) < 1e-14


@pytest.mark.parametrize(
    "change",
    [
        lambda hidden, labels: (hidden[0, 0], labels[0, 2]),
        lambda hidden, labels: (hidden[:, :0], labels[:, :0]),
        lambda hidden, labels: (hidden.transpose(0, 1), labels.transpose(0, 1)),
        lambda hidden, labels: (hidden[:, ::2], labels[:, ::2]),
        lambda hidden, labels: (hidden[:1].expand(3, -1, -1), labels),
        lambda hidden, labels: (hidden.unsqueeze(0), labels.unsqueeze(0)),
    ],
    ids=["one token", "none", "transposed", "every other", "expanded", "four dimensions"],
)
def test_any_leading_shape_and_strides_are_taken(change: Callable[..., tuple[Tensor, Tensor]]) -> None:
    (hidden, weight, _), labels = make()
    x, own = change(hidden, labels)
    loss = longspan.chunked_cross_entropy(x, weight, own, chunk_size=10)
    total = plain(x.reshape(-1, WIDTH), weight, None, own.reshape(-1), reduction="sum")
    want = total / int((own != -100).sum()) if own.numel() else total
    got = with_gradients(loss, [hidden, weight])
    assert worst(errors(got, with_gradients(want, [hidden, weight]))) < 1e-13


def test_a_chunk_has_as_many_tokens_as_make_64_mebibytes_of_logits() -> None:
    assert chunk_size_of(32_000) * 32_000 * 4 <= CHUNK_BYTES == 64 * 2**20
    assert chunk_size_of(2_048) == 8_192
    assert chunk_size_of(10**6) == 256


def on_ranks(order: Any, as_tensor: bool) -> list[float]:
    """Errors of the sums over ranks of losses and gradients; rank 1 has no valid token."""
    inputs, labels = make(shape=(1, 40))
    layout = SequenceLayout(40, order=order)
    own = layout.shard(labels)
    if layout.rank == 1:
        own = torch.full_like(own, -100)
    valid = torch.tensor(int((own != -100).sum()))
    dist.all_reduce(valid)
    hidden, weight, bias = inputs
    loss = longspan.chunked_cross_entropy(
        layout.shard(hidden), weight, own, bias=bias, num_valid=valid if as_tensor else int(valid), chunk_size=3
    )
    got = [loss.detach().clone(), *torch.autograd.grad(loss, inputs)]
    for x in got:
        dist.all_reduce(x)
    whole = layout.gather(own)
    want = plain(*inputs, whole)
    return errors(got, [want.detach(), *torch.autograd.grad(want, inputs)])


@pytest.mark.parametrize("order", [pytest.param("contiguous", marks=pytest.mark.slow), "zigzag"])
def test_ranks_losses_and_gradients_add_up_to_those_of_the_mean_over_all(order: str) -> None:
    for as_tensor in (True, False):
        for found in run_on_ranks(2, on_ranks, order, as_tensor):
            assert worst(found) < 1e-13
