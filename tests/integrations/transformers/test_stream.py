"""Models of Transformers in segments of time: loss and every gradient are those of the unmodified model in one piece."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import longspan
from longspan.integrations.transformers import stream_batch
from longspan.integrations.transformers.losses import LossKind
from longspan.layout import Order
from tests.compare import relative_error, worst_of
from tests.integrations.transformers.families import FAMILIES, build
from tests.integrations.transformers.reference import PACKED, PLAIN, Batch, Expected, Wide, expected, gradients_of
from tests.integrations.transformers.test_losses import BALANCED, averaged, num_items
from tests.ranks import run_on_ranks
from tests.streaming.test_stream import count_copies_to_host_memory

TOLERANCE = 1e-10
KINDS: dict[str, Batch] = {"plain": PLAIN, "packed": PACKED}
ON_ONE_RANK = ("llama4", "minimax", "mamba", "recurrent_gemma", "rwkv", "zamba2")
"""Beside Qwen3-Next a family for each kind of memory that it has not: chunks of keys, a decay by constants, states of hooked
mixers, windows and states of modules, states that are rescaled, and layers that share a mixer. The others are slow."""


@functools.lru_cache(maxsize=4)
def expected_of(name: str, kind: str) -> Expected:
    return expected(build(name), KINDS[kind])


def errors_of_this_rank(
    name: str, kind: str, order: Order, segment_tokens: int, options: dict[str, Any], want: Expected
) -> dict[str, float]:
    """Errors of the loss with and without gradients, and of each gradient, which is summed over the ranks."""
    model = build(name)
    longspan.parallelize(model, None, order=order, loss="sum")
    streamed = longspan.stream(model, segment_tokens, **options)
    batch = stream_batch(model, KINDS[kind].arguments())
    with Wide():
        loss = streamed.forward_backward(**batch)
        whole = streamed.loss(**batch)
    if dist.is_initialized():
        longspan.sum_gradients(model)
        dist.all_reduce(loss)
    got = gradients_of(model)
    if got.keys() != want.gradients.keys():
        raise AssertionError(f"gradients of other parameters: {sorted(got.keys() ^ want.gradients.keys())}")
    errors = {f"gradient of {key}": relative_error(got[key], want.gradients[key]) for key in got}
    errors["loss"] = relative_error(loss, want.loss)
    errors["loss without gradients"] = relative_error(whole, want.loss)
    return errors


def check(name: str, kind: str, num_ranks: int, order: Order, segment_tokens: int = 10, **options: Any) -> None:
    given = name, kind, order, segment_tokens, options, expected_of(name, kind)
    # One rank needs no process of its own.
    found = run_on_ranks(num_ranks, errors_of_this_rank, *given) if num_ranks > 1 else [errors_of_this_rank(*given)]
    for rank, errors in enumerate(found):
        error, what = worst_of(errors)
        assert error < TOLERANCE, f"{name} on rank {rank} of {num_ranks}: {what} is off by {error:.1e}"


@pytest.mark.slow_rows(*(f"^{name}$" for name in FAMILIES if name != "qwen3_next"))
@pytest.mark.parametrize("name", FAMILIES)
def test_segments_over_two_ranks_are_one_piece(name: str) -> None:
    check(name, "packed", 2, "zigzag")


@pytest.mark.slow_rows(*(f"^{name}$" for name in FAMILIES if name not in ON_ONE_RANK))
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^zamba2$")
@pytest.mark.parametrize("name", FAMILIES)
def test_segments_on_one_rank_are_one_piece(name: str) -> None:
    check(name, "packed", 1, "contiguous")


@pytest.mark.slow
def test_segments_shorter_than_taps_and_windows() -> None:
    """And memory that is computed a third time."""
    check("lfm2", "packed", 2, "contiguous", segment_tokens=2, keep_every=5)
    check("gemma3", "packed", 2, "zigzag", segment_tokens=4, offload=True)


def test_keys_are_in_host_memory_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    copied = count_copies_to_host_memory(monkeypatch)
    check("llama", "plain", 1, "contiguous")
    assert not copied
    check("llama", "plain", 1, "contiguous", offload=True)
    assert copied


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_one_document_each(name: str, num_ranks: int) -> None:
    check(name, "plain", num_ranks, "contiguous")


def loss_and_gradients(
    name: str, options: dict[str, Any], kind: LossKind, given: dict[str, Any], divide: bool
) -> dict[str, Tensor]:
    """What all ranks' losses and gradients are together; "without gradients" is what this rank's loss is then."""
    model: Any = longspan.parallelize(build(name, **options), None, loss=kind)
    batch = stream_batch(model, {**PLAIN.arguments(), **given})
    streamed = longspan.stream(model, 10)
    with Wide():
        loss = streamed.forward_backward(**batch)
        alone = streamed.loss(**batch)
    return {**averaged({"loss": loss, **gradients_of(model)}, divide), "without gradients": alone}


@pytest.mark.slow_rows("with a mean$")
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^averaged, with balance$")
@pytest.mark.parametrize(
    ("name", "kind", "divide", "given", "alone", "options"),
    [
        ("qwen3_next", "mean", True, {}, 1.0, {**BALANCED, "mlp_only_layers": []}),
        ("bamba", "sum", False, {}, 1.0, {"z_loss_coefficient": 0.1}),
        ("llama", "mean", False, {"num_items_in_batch": num_items()}, 0.5, {}),
    ],
    ids=["averaged, with balance", "summed, with a mean", "counted by a trainer"],
)
def test_losses_are_those_of_a_call(
    name: str, kind: LossKind, divide: bool, given: dict[str, Any], alone: float, options: dict[str, Any]
) -> None:
    want = expected(build(name, **options), PLAIN)
    for values in run_on_ranks(2, loss_and_gradients, name, options, kind, given, divide):
        errors = {key: relative_error(values[key], gradient) for key, gradient in want.gradients.items()}
        errors["loss"] = relative_error(values["loss"], want.loss)
        errors["loss without gradients"] = relative_error(values["without gradients"], want.loss * alone)
        error, what = worst_of(errors)
        assert error < TOLERANCE, f"{what} is off by {error:.1e}"


def scores_on_rank() -> tuple[float, bool]:
    """The error of each token's loss, and whether the same labels are the likeliest, beside a call's logits."""
    model: Any = longspan.parallelize(build("bamba"), None, order="contiguous")
    batch = stream_batch(model, PLAIN.arguments())
    del batch["num_valid"]
    with Wide(), torch.no_grad():
        found = list(longspan.stream(model, 10).scores(**batch))
        logits = batch["layout"].gather(model(PLAIN.ids).logits)
    labels = batch["labels"]
    want = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    starts = range(0, labels.shape[1], 10)
    parts = [batch["layout"].stretch(start, min(start + 10, labels.shape[1])) for start in starts]
    nats = torch.cat([layout.gather(scores.nats) for layout, scores in zip(parts, found, strict=True)], 1)
    likeliest = torch.cat(
        [layout.gather(scores.is_likeliest.double()) for layout, scores in zip(parts, found, strict=True)], 1
    )
    is_same = bool((likeliest.bool() == ((logits.argmax(-1) == labels) & (labels != -100))).all())
    return relative_error(nats, want), is_same


def test_scores_are_those_of_a_calls_logits() -> None:
    for error, is_same in run_on_ranks(2, scores_on_rank):
        assert error < TOLERANCE and is_same


def test_rows_may_be_padded_on_the_right() -> None:
    ids, labels, mask = PLAIN.ids.clone(), PLAIN.labels.clone(), torch.ones_like(PLAIN.ids)
    ids[0, -9:], labels[0, -9:], mask[0, -9:] = 0, -100, 0
    want = expected(build("bamba"), Batch(ids, labels), attention_mask=mask)
    model: Any = longspan.parallelize(build("bamba"), None)
    with Wide():
        given = stream_batch(model, {"input_ids": ids, "labels": labels, "attention_mask": mask})
        loss = longspan.stream(model, 10).forward_backward(**given)
    got = gradients_of(model)
    errors = {key: relative_error(got[key], x) for key, x in want.gradients.items()}
    errors["loss"] = relative_error(loss, want.loss)
    error, what = worst_of(errors)
    assert got.keys() == want.gradients.keys() and error < TOLERANCE, f"{what} is off by {error:.1e}"
