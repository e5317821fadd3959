"""What a parallelized model may be called with: documents of all kinds, padding, embeddings, sequences that are split already."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import longspan
from longspan.errors import InputError, LayoutError
from longspan.integrations.transformers import layout_of, shard_batch
from longspan.integrations.transformers.inputs import document_bounds, in_one_row
from longspan.layout import Order
from tests.compare import relative_error, worst_of
from tests.integrations.transformers.families import build
from tests.integrations.transformers.reference import PACKED, PLAIN, Wide, expected, gradients_of
from tests.ranks import raised, run_on_ranks

IDS = torch.ones(2, 7, dtype=torch.int64)


def positions(*rows: list[int]) -> Tensor:
    return torch.tensor(rows)


@pytest.mark.parametrize(
    ("given", "bounds"),
    [
        ({}, None),
        ({"position_ids": positions([0, 1, 2, 3, 4, 5, 6])}, None),
        ({"position_ids": positions([5, 6, 7, 8, 9, 10, 11], [0, 1, 2, 3, 4, 5, 6])}, None),
        ({"position_ids": positions([0, 1, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6])}, [0, 2, 7, 14]),
        ({"position_ids": positions([0, 1, 0, 1, 0, 1, 2])}, [0, 2, 4, 7, 9, 11, 14]),
        # Numbers that begin with 1, as some models count.
        ({"position_ids": positions([1, 2, 1, 2, 3, 4, 5])}, [0, 2, 7, 9, 14]),
        ({"position_ids": torch.stack([positions([0, 1, 0, 1, 2, 3, 4]).expand(2, -1)] * 3)}, [0, 2, 7, 9, 14]),
        ({"seq_idx": positions([0, 0, 1, 1, 1, 2, 2], [0] * 7)}, [0, 2, 5, 7, 14]),
        # Positions behind padding on the right mean nothing.
        (
            {
                "position_ids": positions([0, 1, 2, 3, 1, 1, 1]),
                "attention_mask": positions([1, 1, 1, 1, 0, 0, 0], [1] * 7),
            },
            [0, 7, 11, 12, 13, 14],
        ),
        (
            {
                "position_ids": positions([0, 1, 2, 3, 1, 1, 1], [0, 1, 2, 3, 4, 5, 6]),
                "attention_mask": positions([1, 1, 1, 1, 0, 0, 0], [1] * 7),
            },
            None,
        ),
    ],
)
def test_documents_are_found(given: dict[str, Tensor], bounds: list[int] | None) -> None:
    assert document_bounds({"input_ids": IDS, **given}) == bounds


def test_bounds_that_a_collator_gives_are_taken() -> None:
    one_row = {"input_ids": IDS[:1], "cu_seq_lens_q": torch.tensor([0, 3, 7], dtype=torch.int32)}
    assert document_bounds(one_row) == [0, 3, 7]
    assert document_bounds({**one_row, "cu_seq_lens_q": torch.tensor([0, 7])}) is None
    # Some collators repeat the last bound.
    assert document_bounds({**one_row, "cu_seq_lens_q": torch.tensor([0, 3, 7, 7])}) == [0, 3, 7]
    for wrong in ([0, 3, 8], [1, 7]):
        with pytest.raises(InputError, match="from 0 to its 7 tokens"):
            document_bounds({**one_row, "cu_seq_lens_q": torch.tensor(wrong)})


def test_rows_of_multimodal_positions_go_one_after_another() -> None:
    axes = torch.arange(3 * 2 * 7).view(3, 2, 7)
    flat = in_one_row({"input_ids": IDS, "position_ids": axes})
    assert flat["input_ids"].shape == (1, 14)
    assert torch.equal(flat["position_ids"], axes.reshape(3, 1, 14))


def packed_rows() -> dict[str, Tensor]:
    """Two rows of packed documents, as TRL's collators make them."""
    bounds = (0, 9, 30), (0, 13, 14, 30)
    numbers = [torch.cat([torch.arange(b - a) for a, b in pairwise(row)]) for row in bounds]
    generator = torch.Generator().manual_seed(9)
    ids = torch.randint(1, 61, (2, 30), generator=generator)
    return {"input_ids": ids, "labels": ids.clone(), "position_ids": torch.stack(numbers)}


def gradients_of_rows(name: str, one_by_one: bool) -> dict[str, Tensor]:
    model = longspan.parallelize(build(name), None, loss="sum")
    given = packed_rows()
    # No token predicts the first of a document, and a caller who counts labels does not count it.
    given["labels"][given["position_ids"] == 0] = -100
    with Wide():
        if one_by_one:
            count = (given["labels"][:, 1:] != -100).sum()
            for row in range(2):
                part = {key: value[row : row + 1] for key, value in given.items()}
                model(**part, num_items_in_batch=count).loss.backward()
        else:
            model(**given).loss.backward()
    longspan.sum_gradients(model)
    return gradients_of(model)


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^qwen3_next$")
@pytest.mark.parametrize("name", ["qwen3_next", "llama"])
def test_several_packed_rows_are_so_many_documents(name: str) -> None:
    together = run_on_ranks(2, gradients_of_rows, name, False)
    apart = run_on_ranks(2, gradients_of_rows, name, True)
    for got, want in zip(together, apart, strict=True):
        error, what = worst_of({key: relative_error(got[key], want[key]) for key in want})
        assert error < 1e-12, what


def padded_or_not(name: str) -> float:
    """Logits of a padded row and of the row alone."""
    model = longspan.parallelize(build(name), None)
    mask = torch.ones_like(PLAIN.ids)
    mask[1, 20:] = 0
    with Wide(), torch.no_grad():
        padded = layout_of_logits(model, input_ids=PLAIN.ids, attention_mask=mask)
        alone = layout_of_logits(model, input_ids=PLAIN.ids[1:, :20])
    return relative_error(padded[1:, :20], alone)


def layout_of_logits(model: Any, **given: Any) -> Tensor:
    logits = model(**given).logits
    return layout_of(model).gather(logits)


@pytest.mark.parametrize("name", ["qwen3_next", "llama", "mamba2"])
def test_padding_on_the_right_changes_nothing(name: str) -> None:
    assert all(error < 1e-12 for error in run_on_ranks(2, padded_or_not, name))


def embedded_or_not() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    model = longspan.parallelize(build("llama"), None)
    embeds = model.get_input_embeddings()(PLAIN.ids).detach().requires_grad_()  # type: ignore[operator]
    with Wide():
        out = model(inputs_embeds=embeds, labels=PLAIN.labels)
        out.loss.backward()
        same = model(**PLAIN.arguments())
    gradient = embeds.grad
    assert gradient is not None
    dist.all_reduce(gradient)
    return out.logits.detach(), same.logits.detach(), gradient, out.loss.detach()


def test_embeddings_are_split_as_ids_are() -> None:
    model = build("llama")
    embeds = model.get_input_embeddings()(PLAIN.ids).detach().requires_grad_()  # type: ignore[operator]
    with Wide():
        model(inputs_embeds=embeds, labels=PLAIN.labels, use_cache=False).loss.backward()
    assert embeds.grad is not None
    for got, same, gradient, _ in run_on_ranks(2, embedded_or_not):
        assert torch.equal(got, same)
        assert relative_error(gradient / 2, embeds.grad) < 1e-12


def told_by_collator(name: str, options: dict[str, bool]) -> float:
    """Error of the logits of documents that Transformers' collator has flattened, and tells in another way than by positions."""
    from transformers import DataCollatorWithFlattening

    model: Any = longspan.parallelize(build(name), None)
    assert PACKED.bounds is not None
    rows = [{"input_ids": PACKED.ids[0, start:stop].tolist()} for start, stop in pairwise(PACKED.bounds)]
    flat = DataCollatorWithFlattening(return_position_ids=False, **options)(rows)
    assert "position_ids" not in flat and torch.equal(flat["input_ids"], PACKED.ids)
    with Wide(), torch.no_grad():
        logits = model(**flat).logits
    return relative_error(layout_of(model).gather(logits), expected(build(name), PACKED).logits)


@pytest.mark.parametrize("options", [{"return_flash_attn_kwargs": True}, {"return_seq_idx": True}])
@pytest.mark.parametrize("name", ["qwen3_next", pytest.param("bamba", marks=pytest.mark.slow)])
def test_documents_may_be_told_as_to_kernels(name: str, options: dict[str, bool]) -> None:
    assert all(error < 1e-12 for error in run_on_ranks(2, told_by_collator, name, options))


def split_by_the_caller(name: str) -> dict[str, float]:
    model = longspan.parallelize(build(name), None, loss="sum")
    layout = longspan.SequenceLayout(PACKED.ids.shape[1], None, "zigzag", PACKED.bounds)
    want = expected(build(name), PACKED)
    with Wide():
        out = model(**shard_batch(PACKED.arguments(), layout))
        out.loss.backward()
    longspan.sum_gradients(model)
    loss = out.loss.detach().clone()
    dist.all_reduce(loss)
    errors = {key: relative_error(gradient, want.gradients[key]) for key, gradient in gradients_of(model).items()}
    errors["loss"] = relative_error(loss, want.loss)
    errors["logits"] = relative_error(layout.gather(out.logits.detach()), want.logits)
    return errors


@pytest.mark.parametrize("name", ["qwen3_next", "mamba2"])
def test_a_caller_may_split_the_sequences_himself(name: str) -> None:
    for errors in run_on_ranks(2, split_by_the_caller, name):
        error, what = worst_of(errors)
        assert error < 1e-10, what


def without_positions() -> tuple[Tensor, Tensor]:
    """Logits of tokens that are split, with their positions and without."""
    model = longspan.parallelize(build("llama"), None)
    layout = longspan.SequenceLayout(PACKED.ids.shape[1], None, "zigzag", PACKED.bounds)
    given = shard_batch({"input_ids": PACKED.ids}, layout)
    with torch.no_grad():
        want = model(**given).logits
        del given["position_ids"]
        return model(**given).logits, want


def test_tokens_that_are_split_have_the_positions_of_their_layout() -> None:
    for got, want in run_on_ranks(2, without_positions):
        assert torch.equal(got, want)


def backbone_after_another_batch() -> float:
    """Error of hidden states of plain rows, where the backbone was called by itself with packed ones before."""
    model: Any = longspan.parallelize(build("llama"), None)
    other: Any = build("llama")
    with Wide(), torch.no_grad():
        model.model(input_ids=PACKED.ids, position_ids=PACKED.positions)
        got = model.model(input_ids=PACKED.ids).last_hidden_state
        want = other.model(input_ids=PACKED.ids, use_cache=False).last_hidden_state
    return relative_error(layout_of(model).gather(got), want)


def test_a_backbone_that_is_called_by_itself_has_the_documents_of_each_call() -> None:
    assert all(error < 1e-12 for error in run_on_ranks(2, backbone_after_another_batch))


def wrong_layouts() -> list[tuple[str, str]]:
    model = longspan.parallelize(build("llama"), None)
    layout = longspan.SequenceLayout(37)
    local = layout.shard(PLAIN.ids)
    given = shard_batch({"input_ids": PLAIN.ids}, layout)
    return [
        raised(lambda: model(input_ids=PLAIN.ids, longspan_layout=layout)),
        raised(lambda: model(input_ids=local, labels=local, longspan_layout=layout)),
        raised(lambda: model(input_ids=local, longspan_layout="mine")),
        raised(lambda: model(input_ids=PLAIN.ids, longspan_layout=longspan.SequenceLayout.local(37))),
        raised(lambda: model(**given, output_attentions=True)),
    ]


def test_a_layout_that_does_not_fit_is_refused() -> None:
    for whole, labels, kind, group, attentions in run_on_ranks(2, wrong_layouts):
        assert whole[0] == "LayoutError" and "shard" in whole[1]
        assert labels[0] == "LayoutError" and "shifted before the split" in labels[1]
        assert kind[0] == "InputError" and "SequenceLayout" in kind[1]
        assert group[0] == "LayoutError" and "another group" in group[1]
        assert attentions[0] == "InputError" and "attention weights" in attentions[1]
    assert LayoutError is longspan.LayoutError


def other_batches() -> tuple[str, str]:
    model = longspan.parallelize(build("llama"), None)
    ids = PLAIN.ids.clone()
    ids[0, dist.get_rank()] = 1
    return raised(lambda: model(input_ids=ids))


def other_batches_after_verify() -> tuple[str, str]:
    model = longspan.parallelize(build("llama"), None, verify=True)
    model(input_ids=PLAIN.ids)
    return raised(lambda: model(input_ids=PLAIN.ids + dist.get_rank()))


def other_batches_after_evaluation() -> tuple[str, str]:
    """The sampler of training is another than that of evaluation."""
    model = longspan.parallelize(build("llama"), None)
    with torch.no_grad():
        for _ in range(2):
            model(input_ids=PLAIN.ids)
    return raised(lambda: model(input_ids=PLAIN.ids + dist.get_rank()))


def other_lengths() -> tuple[str, str]:
    model = longspan.parallelize(build("llama"), None)
    return raised(lambda: model(input_ids=PLAIN.ids[:, : 20 + dist.get_rank()]))


@pytest.mark.parametrize(
    "call", [other_batches, other_batches_after_verify, other_batches_after_evaluation, other_lengths]
)
def test_ranks_with_other_batches_are_told(call: Any) -> None:
    for kind, message in run_on_ranks(2, call):
        assert kind == "InputError"
        assert "different batches" in message and "DistributedSampler" in message


def lengths(name: str, length: int, order: Order) -> float:
    model, other = build(name), build(name)
    longspan.parallelize(model, None, order=order)
    ids = PLAIN.ids[:, :length]
    with Wide(), torch.no_grad():
        got = layout_of_logits(model, input_ids=ids)
        want = other(input_ids=ids, use_cache=False).logits
    return relative_error(got, want)


# Each model, length and order once.
@pytest.mark.slow_rows(r"^qwen3_next-7", r"^bamba-4")
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^qwen3_next-4-")
@pytest.mark.parametrize(("length", "order"), [(4, "contiguous"), (7, "zigzag")])
@pytest.mark.parametrize("name", ["qwen3_next", "bamba"])
def test_shards_shorter_than_a_convolution(name: str, length: int, order: Order) -> None:
    assert all(error < 1e-10 for error in run_on_ranks(4, lengths, name, length, order))


@pytest.mark.parametrize(("name", "order"), [("llama", "zigzag"), ("bamba", "zigzag"), ("mamba2", "contiguous")])
def test_models_without_softmax_layers_need_no_balance(name: str, order: Order) -> None:
    for found in run_on_ranks(2, order_by_default, name):
        assert found == order


def order_by_default(name: str) -> str:
    model: Any = longspan.parallelize(build(name), None)
    with torch.no_grad():
        model(input_ids=PLAIN.ids)
    return layout_of(model).order
