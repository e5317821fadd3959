"""Documents in training: each as if it were alone, on any ranks; what is counted of them is known from the data alone."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import longspan
from longspan import SequenceLayout
from longspan.data.batches import TrainingBatches
from longspan.data.loader import Loader
from longspan.data.packing import Documents, Sequences
from longspan.errors import DataError
from longspan.layout import ORDERS
from longspan.models import LinearLlama3
from longspan.train.config import Config
from longspan.train.loss import loss_sum
from longspan.train.step_batch import make_step_batch
from tests.compare import relative_error, worst
from tests.data.shards import write_stream
from tests.models.tiny import random_tokens, tiny_model
from tests.ranks import raised, run_on_ranks
from tests.shared import made_once
from tests.train.tiny import metrics, tiny_config, train_here

# Documents of 1 to 61 tokens: at a row's first token, across rank boundaries of 2 and 4 ranks, around a row's end and behind it.
LENGTH = 61
STARTS = ((1, 2, 30, 31, 33, 60), (7, 61), ())
MODEL = {"vocab_size": 29, "pattern": "LLN", "num_layers": 3}
OPERATORS = ("simple_gla", "gated_deltanet")


def sequences() -> Sequences:
    return Sequences(random_tokens(3, LENGTH + 1, seed=3), STARTS)


def documents_alone() -> list[Tensor]:
    """Each document of `sequences`, or as much of it as a row has, with the token that follows where that is its own."""
    found = []
    for row, starts in zip(sequences().tokens, STARTS, strict=True):
        bounds = [0, *starts]
        found += [row[start:stop] for start, stop in zip(bounds, [*starts, LENGTH + 1], strict=True) if stop > start]
    return found


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]


def expected(operator: str) -> list[Tensor]:
    """Loss and gradients of every document in a call of its own, its positions from zero, on one process."""
    model = tiny_model(**MODEL, operator=operator)
    num_valid = sum(len(tokens) - 1 for tokens in documents_alone())
    total = torch.zeros((), dtype=torch.float64)
    for tokens in documents_alone():
        if len(tokens) > 1:
            logits = model(tokens[None, :-1])
            total = total + nn.functional.cross_entropy(logits[0], tokens[1:], reduction="sum") / num_valid
    total.backward()
    return [total.detach(), *gradients(model)]


def packed_over_ranks(operator: str, order: Any, rows_at_once: int) -> list[Tensor]:
    """The same of packed rows, as the trainer computes them: micro batches, shares of the loss, gradients summed."""
    model: LinearLlama3 = longspan.parallelize(tiny_model(**MODEL, operator=operator), None)
    total = torch.zeros((), dtype=torch.float64)
    whole = sequences()
    for first in range(0, len(whole), rows_at_once):
        batch = whole.rows(first, rows_at_once).packed()
        layout = SequenceLayout(batch.seq_len, order=order, documents=batch.documents)
        loss = loss_sum(model, batch, layout) / whole.num_valid_tokens
        loss.backward()
        total += loss.detach()
    longspan.sum_gradients(model)
    dist.all_reduce(total)
    return [total, *gradients(model)]


@pytest.mark.slow_rows(r"^4-gated")
@pytest.mark.slow_rows(r"^1-|^4-simple")
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^2-gated_deltanet$")
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_packed_documents_are_trained_on_as_if_each_were_alone(operator: str, num_ranks: int) -> None:
    want = expected(operator)
    for order, rows_at_once in ((ORDERS[0], 3), (ORDERS[1], 3), (ORDERS[1], 1)):
        for got in run_on_ranks(num_ranks, packed_over_ranks, operator, order, rows_at_once):
            assert worst([relative_error(x, y) for x, y in zip(got, want, strict=True)]) < 1e-10


def test_number_of_valid_tokens_is_that_of_the_documents_alone() -> None:
    assert sequences().num_valid_tokens == sum(len(tokens) - 1 for tokens in documents_alone())


@pytest.mark.parametrize("documents", ["reset", "concatenate"])
def test_a_global_batch_is_the_same_whatever_the_mesh(tmp_path: Path, documents: Documents) -> None:
    texts = [list(range(start, start + size)) for size in (3, 50, 8, 120) for start in range(0, 120, 7)]
    batches = TrainingBatches((write_stream(tmp_path, texts, 300, 5),), 16, 12, seed=0, documents=documents)
    for step in range(6):
        whole = batches.batch(step)
        for dp, rows_at_once in ((1, None), (1, 5), (2, None), (3, 1), (4, 2), (12, None)):
            found = []
            for dp_rank in range(dp):
                ranks: Any = SimpleNamespace(dp=dp, dp_rank=dp_rank, device=torch.device("cpu"))
                made = make_step_batch(batches, step, ranks, rows_at_once, SequenceLayout.local)
                assert made.num_valid_tokens == whole.num_valid_tokens
                for batch, layout in made.micro_batches:
                    assert layout.documents == batch.documents and layout.seq_len == batch.seq_len
                    found.append(torch.stack([batch.inputs.flatten(), batch.labels.flatten()]))
            expected = torch.stack([whole.tokens[:, :-1].flatten(), whole.labels.flatten()])
            assert torch.equal(torch.cat(found, dim=1), expected)


WITH_SHORT = {"train__seq_len": 500, "train__batch_tokens": 2000, "train__steps": 3, "checkpoint__every": 2}


@pytest.fixture(scope="session")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on one process whose sequences hold several documents, and parts of them."""

    def make(folder: Path) -> str:
        run_on_ranks(1, train_here, tiny_config(corpus, folder / "run", parallel__sp=1, **WITH_SHORT))
        return str(folder / "run")

    return Path(made_once(tmp_path_factory, "documents-finished", make))


@pytest.mark.parametrize(
    ("num_ranks", "values"),
    [
        (2, {"parallel__sp": 2}),
        # Batches are the same whatever the mesh, and data-parallel runs are in `tests/train/test_run.py`.
        pytest.param(2, {"parallel__sp": 1, "train__micro_batch_sequences": 1}, marks=pytest.mark.slow),
        pytest.param(
            4,
            {"parallel__sp": 4, "parallel__order": "contiguous", "train__micro_batch_sequences": 3},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_with_documents_is_the_same_on_any_ranks(
    corpus: Path, finished: Path, tmp_path: Path, num_ranks: int, values: dict[str, Any]
) -> None:
    run_on_ranks(num_ranks, train_here, tiny_config(corpus, tmp_path / "run", **WITH_SHORT, **values))
    keys = ("step", "loss", "gradient_norm", "valid_tokens", "validation_loss", "validation_bits_per_byte")
    for ours, theirs in zip(metrics(tmp_path / "run", *keys), metrics(finished, *keys), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    ours, theirs = (json.loads((run / "summary.json").read_text()) for run in (tmp_path / "run", finished))
    assert ours["tokens_by_document_length"] == theirs["tokens_by_document_length"]
    assert ours["unigram_loss"] == theirs["unigram_loss"]


def test_what_was_seen_is_counted_by_the_length_of_documents_and_survives_a_resume(
    corpus: Path, finished: Path, tmp_path: Path
) -> None:
    # A hundred words of five or six letters and a space, and the end of the document: 512 to 1023 tokens.
    seen = json.loads((finished / "summary.json").read_text())["tokens_by_document_length"]
    assert seen == {"512-1023": 3 * 2000}
    assert "| 512-1023 | 6,000 |" in (finished / "summary.md").read_text()
    of_steps = [{"tokens_seen/512-1023": 2000}, {"tokens_seen/512-1023": 4000}, {"tokens_seen/512-1023": 6000}]
    assert seen_by_length(finished) == of_steps
    run = tmp_path / "run"
    run_on_ranks(1, train_here, tiny_config(corpus, run, parallel__sp=1, **WITH_SHORT | {"train__steps": 2}))
    run_on_ranks(1, train_here, tiny_config(corpus, run, parallel__sp=1, **WITH_SHORT), True)
    assert json.loads((run / "summary.json").read_text())["tokens_by_document_length"] == seen
    assert seen_by_length(run) == of_steps


def seen_by_length(run: Path) -> list[dict[str, int]]:
    """Of each step of a run: tokens seen so far, by the length of their documents."""
    steps = [record for record in metrics(run) if "loss" in record]
    return [{key: value for key, value in step.items() if key.startswith("tokens_seen/")} for step in steps]


def test_resetting_differs_from_concatenating(corpus: Path, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = tiny_config(corpus, run, parallel__sp=1, data__documents="concatenate", **WITH_SHORT)
    run_on_ranks(1, train_here, config)
    ours, theirs = metrics(run), metrics(finished)
    assert [r["valid_tokens"] for r in ours if "valid_tokens" in r] == [2000] * 3
    assert all(r["valid_tokens"] < 2000 for r in theirs if "valid_tokens" in r)
    assert abs(ours[0]["loss"] - theirs[0]["loss"]) > 1e-5


def _with_slow_reading(config: Config) -> int:
    read, wait = TrainingBatches.batch, Loader.wait
    waited_for = threading.Semaphore(0)

    def noticed(loader: Loader[Any]) -> float:
        if not loader.is_settled:
            waited_for.release()
        return wait(loader)

    def slow(batches: TrainingBatches, step: int, *arguments: int) -> Sequences:
        if arguments and dist.get_rank() == 1:
            # However long the steps take: not before the trainer waits for it.
            assert waited_for.acquire(timeout=60)
            time.sleep(0.05)
        return read(batches, step, *arguments)

    with mock.patch.object(TrainingBatches, "batch", slow), mock.patch.object(Loader, "wait", noticed):
        return train_here(config)


def test_slow_reading_on_one_rank_shows_as_data_wait(corpus: Path, tmp_path: Path) -> None:
    run_on_ranks(2, _with_slow_reading, tiny_config(corpus, tmp_path / "run", **WITH_SHORT))
    records = [record for record in metrics(tmp_path / "run") if "data_wait" in record]
    # A step waits for the next one's batch, which the last step does not have.
    assert [record["data_wait"] >= 0.04 for record in records] == [True, True, False]
    assert all(record["data_wait_share"] == record["data_wait"] / record["seconds"] <= 1 for record in records)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    waited, seconds = (sum(record[key] for record in records) for key in ("data_wait", "seconds"))
    assert summary["data_wait_share"] == pytest.approx(waited / seconds)


def _with_a_bad_batch(config: Config, bad_step: int) -> int:
    read = TrainingBatches.batch

    def bad(batches: TrainingBatches, step: int, *arguments: int) -> Sequences:
        if step == bad_step and dist.get_rank() == 1 and arguments:
            raise DataError("train.bin is damaged at byte 17")
        return read(batches, step, *arguments)

    with mock.patch.object(TrainingBatches, "batch", bad):
        return train_here(config)


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^2$")
@pytest.mark.parametrize("bad_step", [0, 2])
def test_what_one_rank_cannot_read_stops_all_before_the_step_that_needs_it(
    corpus: Path, tmp_path: Path, bad_step: int
) -> None:
    config = tiny_config(corpus, tmp_path / "run", **WITH_SHORT)
    for kind, text in run_on_ranks(2, raised, _with_a_bad_batch, config, bad_step):
        assert (kind, text) == ("DataError", "train.bin is damaged at byte 17")
    steps = [record["step"] for record in metrics(tmp_path / "run") if "loss" in record] if bad_step else []
    assert steps == list(range(1, bad_step + 1))
