"""The tokens of a step are a function of the seed and the step."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from longspan.data.batches import TrainingBatches, validation_sequences
from longspan.data.tokens import TokenFile, open_token_file, write_token_file
from longspan.errors import DataError


def tokens(path: Path, count: int) -> TokenFile:
    write_token_file(path / "train.bin", [list(range(count))], count, count, "")
    return open_token_file(path / "train.bin")


def test_a_batch_does_not_depend_on_what_was_read_before(tmp_path: Path) -> None:
    file = tokens(tmp_path, 1000)
    batches = TrainingBatches(file, 16, 4, seed=3)
    in_order = [batches.batch(step).tokens for step in range(40)]
    for step in (39, 7, 0, 20):
        assert torch.equal(TrainingBatches(file, 16, 4, seed=3).batch(step).tokens, in_order[step])
    assert not torch.equal(TrainingBatches(file, 16, 4, seed=4).batch(0).tokens, in_order[0])


def test_parts_of_a_batch_are_its_rows(tmp_path: Path) -> None:
    batches = TrainingBatches(tokens(tmp_path, 1000), 16, 4, seed=3)
    whole = batches.batch(5).tokens
    assert whole.shape == (4, 17)
    assert torch.equal(torch.cat([batches.batch(5, 0, 1).tokens, batches.batch(5, 1, 3).tokens]), whole)


def test_sequences_are_consecutive_tokens_and_an_epoch_repeats_none(tmp_path: Path) -> None:
    batches = TrainingBatches(tokens(tmp_path, 1000), 16, 1, seed=0)
    epoch = torch.cat([batches.batch(step).tokens for step in range(batches.sequences_per_epoch)])
    assert (epoch.diff() == 1).all()
    inputs = epoch[:, :-1].flatten().tolist()
    assert len(set(inputs)) == len(inputs) == 62 * 16
    following = torch.cat([batches.batch(62 + step).tokens for step in range(62)])
    assert not torch.equal(following, epoch)


def test_a_corpus_smaller_than_one_batch_is_refused(tmp_path: Path) -> None:
    file = tokens(tmp_path, 64)
    with pytest.raises(DataError, match=r"has 64 tokens, fewer than one global batch of 4 sequences of 16 .*\(65\)"):
        TrainingBatches(file, 16, 4, seed=0)
    assert TrainingBatches(file, 63, 1, seed=0).batch(1).tokens.tolist() == [list(range(64))]


def test_validation_sequences_are_spread_over_the_file(tmp_path: Path) -> None:
    file = tokens(tmp_path, 50)
    assert (
        validation_sequences(file, 16, 8).tokens.tolist()
        == np.lib.stride_tricks.sliding_window_view(np.arange(49), 17)[::16].tolist()
    )
    assert validation_sequences(file, 16, 2).tokens[:, 0].tolist() == [0, 16]
    assert validation_sequences(file, 4, 3).tokens[:, 0].tolist() == [0, 16, 32]
    assert validation_sequences(file, 100, 8).tokens.tolist() == [list(range(50))]
    with pytest.raises(DataError, match="has 50 tokens; validation needs 51"):
        validation_sequences(file, 100, 8, least=50)


def test_documents_of_sequences_are_those_of_the_file(tmp_path: Path) -> None:
    # Tokens count up, so that a sequence says where it is from.
    bounds = [0, 1, 5, 40, 41, 120, 121, 122, 260, 300]
    documents = [list(range(start, stop)) for start, stop in pairwise(bounds)]
    write_token_file(tmp_path / "train.bin", documents, 300, 300, "")
    file = open_token_file(tmp_path / "train.bin")
    batches = TrainingBatches(file, 16, 3, seed=1, documents="reset")
    seen = np.zeros(64, dtype=np.int64)
    for step in range(12):
        batch = batches.batch(step)
        assert batch.document_starts is not None
        for row, starts in zip(batch.tokens.tolist(), batch.document_starts, strict=True):
            assert [row[0] + start for start in starts] == [b for b in bounds[:-1] if row[0] < b <= row[0] + 16]
            for token in row[:-1]:
                index = next(i for i, stop in enumerate(bounds[1:]) if token < stop)
                seen[int(np.log2(bounds[index + 1] - bounds[index]))] += 1
        assert batches.num_valid_tokens(step) == batch.num_valid_tokens <= 48
        assert (batches.tokens_by_document_length(step) == seen).all()
        seen[:] = 0
    assert file.num_longer_documents(35) == 3
    concatenated = TrainingBatches(file, 16, 3, seed=1, documents="concatenate")
    assert concatenated.num_valid_tokens(0) == 48
    assert torch.equal(concatenated.batch(7).tokens, batches.batch(7).tokens)
