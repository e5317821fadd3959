"""The loss contract: what composes with loops that average, sum, or do nothing, and losses that are no cross-entropy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import longspan
from longspan.integrations.transformers.losses import LossKind
from tests.compare import relative_error, worst_of
from tests.integrations.transformers.families import build
from tests.integrations.transformers.reference import PACKED, PLAIN, Expected, Wide, expected, gradients_of
from tests.ranks import run_on_ranks

BALANCED = {"output_router_logits": True, "router_aux_loss_coef": 0.1}
MASK = torch.ones_like(PLAIN.ids)
MASK[1, 20:] = 0
PADDED = replace(PLAIN, labels=PLAIN.labels.masked_fill(MASK == 0, -100))


def averaged(values: dict[str, Tensor], divide: bool) -> dict[str, Tensor]:
    """Sum over the ranks, divided by their number or not: what DistributedDataParallel does, or `sum_gradients`."""
    for value in values.values():
        dist.all_reduce(value)
        if divide:
            value /= dist.get_world_size()
    return values


def loss_and_gradients(
    name: str, options: dict[str, Any], kind: LossKind, given: dict[str, Any], divide: bool
) -> dict[str, Tensor]:
    """What all ranks' losses and gradients are together; "without gradients" is what this rank's loss is then."""
    model = longspan.parallelize(build(name, **options), None, loss=kind)
    with Wide():
        loss = model(**PLAIN.arguments(), **given).loss
        loss.backward()
        with torch.no_grad():
            alone = model(**PLAIN.arguments(), **given).loss
    found = averaged({"loss": loss.detach().clone(), **gradients_of(model)}, divide)
    return {**found, "without gradients": alone}


def check(name: str, kind: LossKind, divide: bool, given: dict[str, Any], alone: float, **options: Any) -> None:
    """`alone`: what part of the loss a rank sees without gradients."""
    want = expected(build(name, **options), PLAIN)
    for values in run_on_ranks(2, loss_and_gradients, name, options, kind, given, divide):
        errors = {key: relative_error(values[key], gradient) for key, gradient in want.gradients.items()}
        errors["loss"] = relative_error(values["loss"], want.loss)
        errors["loss without gradients"] = relative_error(values["without gradients"], want.loss * alone)
        error, what = worst_of(errors)
        assert error < 1e-10, f"{what} is off by {error:.1e}"


def num_items() -> int:
    """As Trainer counts them: labels behind the first token of each row."""
    return int((PLAIN.labels[:, 1:] != -100).sum())


def test_averaged_gradients_are_those_of_the_whole_loss() -> None:
    check("qwen3_next", "mean", True, {}, alone=1.0)


def test_summed_gradients_are_those_of_the_whole_loss() -> None:
    check("bamba", "sum", False, {}, alone=1.0)


@pytest.mark.parametrize("kind", ["mean", "sum"])
def test_a_trainer_that_counts_items_multiplies_and_averages(kind: LossKind) -> None:
    # Trainer multiplies by the number of ranks and averages: the sum.
    check("llama", kind, False, {"num_items_in_batch": num_items()}, alone=0.5)


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^granitemoehybrid$")
@pytest.mark.parametrize("name", ["qwen3_next", "minimax", "granitemoehybrid"])
def test_the_balance_loss_is_of_all_ranks_tokens(name: str) -> None:
    options = {**BALANCED, "mlp_only_layers": []} if name == "qwen3_next" else BALANCED
    check(name, "mean", True, {}, alone=1.0, **options)


def padded_balance(want: Expected) -> float:
    """Error of a loss with a balance loss, of rows that are padded on the right."""
    model = longspan.parallelize(build("qwen3_next", **BALANCED, mlp_only_layers=[]), None)
    with Wide(), torch.no_grad():
        loss = model(**PADDED.arguments(), attention_mask=MASK).loss
    return relative_error(loss, want.loss)


def test_the_balance_loss_leaves_padding_out() -> None:
    model = build("qwen3_next", **BALANCED, mlp_only_layers=[])
    want = expected(model, PADDED, attention_mask=MASK)
    assert relative_error(want.loss, expected(model, PADDED).loss) > 1e-6, "padding counts for nothing"
    assert all(error < 1e-12 for error in run_on_ranks(2, padded_balance, want))


def test_a_loss_that_is_a_mean_over_tokens_is_of_all_of_them() -> None:
    check("bamba", "mean", True, {}, alone=1.0, z_loss_coefficient=0.1)


def all_labels_ignored(name: str) -> tuple[Tensor, Tensor]:
    """A rank without a label that counts: labels of the last tokens alone, contiguous."""
    model = longspan.parallelize(build(name), None, order="contiguous")
    labels = torch.full_like(PLAIN.ids, -100)
    labels[:, -3:] = PLAIN.ids[:, -3:]
    with Wide():
        loss = model(input_ids=PLAIN.ids, labels=labels).loss
        loss.backward()
    found = averaged({"loss": loss.detach().clone(), **gradients_of(model)}, True)
    return found["loss"], found["lm_head.weight"]


def test_a_rank_may_have_no_label_that_counts() -> None:
    model = build("llama")
    labels = torch.full_like(PLAIN.ids, -100)
    labels[:, -3:] = PLAIN.ids[:, -3:]
    with Wide():
        want = model(input_ids=PLAIN.ids, labels=labels, use_cache=False).loss
        want.backward()
    for loss, gradient in run_on_ranks(2, all_labels_ignored, "llama"):
        assert relative_error(loss, want) < 1e-12
        assert relative_error(gradient, gradients_of(model)["lm_head.weight"]) < 1e-12


def of_tuple() -> tuple[Tensor, Tensor]:
    model = longspan.parallelize(build("llama"), None)
    with Wide():
        output = model(**PLAIN.arguments(), return_dict=False)
        same = model(**PLAIN.arguments()).loss
    return output[0].detach(), same.detach()


def test_a_tuple_has_the_same_loss() -> None:
    for loss, same in run_on_ranks(2, of_tuple):
        assert torch.equal(loss, same)


def documents_labels() -> tuple[Tensor, Tensor]:
    """Labels at the starts of documents are not predicted from the document before."""
    model = longspan.parallelize(build("llama"), None)
    assert PACKED.bounds is not None
    cut = PACKED.labels.clone()
    cut[:, list(PACKED.bounds[:-1])] = -100
    with Wide(), torch.no_grad():
        whole = model(**PACKED.arguments()).loss
        without = model(input_ids=PACKED.ids, labels=cut, position_ids=PACKED.positions).loss
    return whole, without


def test_no_label_is_predicted_across_documents() -> None:
    for whole, without in run_on_ranks(2, documents_labels):
        assert torch.equal(whole, without)
