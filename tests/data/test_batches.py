"""The tokens of a step are a function of the seed and the step."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from longspan.data.batches import TrainingBatches, _shares, validation_sequences
from longspan.data.tokens import TokenStream
from longspan.errors import DataError
from tests.data.shards import write_stream


def tokens(path: Path, count: int, per_shard: int | None = None) -> TokenStream:
    """Tokens that count up, in documents of ten."""
    documents = [list(range(start, min(start + 10, count))) for start in range(0, count, 10)]
    return write_stream(path, documents, count, per_shard)


def test_a_batch_does_not_depend_on_what_was_read_before(tmp_path: Path) -> None:
    file = tokens(tmp_path, 1000)
    batches = TrainingBatches((file,), 16, 4, seed=3)
    in_order = [batches.batch(step).tokens for step in range(40)]
    for step in (39, 7, 0, 20):
        assert torch.equal(TrainingBatches((file,), 16, 4, seed=3).batch(step).tokens, in_order[step])
    assert not torch.equal(TrainingBatches((file,), 16, 4, seed=4).batch(0).tokens, in_order[0])


def test_parts_of_a_batch_are_its_rows(tmp_path: Path) -> None:
    batches = TrainingBatches((tokens(tmp_path, 1000),), 16, 4, seed=3)
    whole = batches.batch(5).tokens
    assert whole.shape == (4, 17)
    assert torch.equal(torch.cat([batches.batch(5, 0, 1).tokens, batches.batch(5, 1, 3).tokens]), whole)


def test_sequences_are_consecutive_tokens_and_an_epoch_repeats_none(tmp_path: Path) -> None:
    batches = TrainingBatches((tokens(tmp_path, 1000),), 16, 1, seed=0)
    epoch = torch.cat([batches.batch(step).tokens for step in range(62)])
    assert (epoch.diff() == 1).all()
    inputs = epoch[:, :-1].flatten().tolist()
    assert len(set(inputs)) == len(inputs) == 62 * 16
    following = torch.cat([batches.batch(62 + step).tokens for step in range(62)])
    assert not torch.equal(following, epoch)


def test_a_corpus_smaller_than_one_batch_is_refused(tmp_path: Path) -> None:
    file = tokens(tmp_path, 64)
    with pytest.raises(DataError, match=r"has 64 tokens, fewer than one global batch of 4 sequences of 16 .*\(65\)"):
        TrainingBatches((file,), 16, 4, seed=0)
    assert TrainingBatches((file,), 63, 1, seed=0).batch(1).tokens.tolist() == [list(range(64))]


def test_validation_sequences_are_spread_over_the_file(tmp_path: Path) -> None:
    file = tokens(tmp_path, 50)
    assert (
        validation_sequences(file, 16, 8).tokens.tolist()
        == np.lib.stride_tricks.sliding_window_view(np.arange(49), 17)[::16].tolist()
    )
    assert validation_sequences(file, 16, 2).tokens[:, 0].tolist() == [0, 16]
    assert validation_sequences(file, 4, 3).tokens[:, 0].tolist() == [0, 16, 32]
    assert validation_sequences(file, 100, 8).tokens.tolist() == [list(range(50))]
    with pytest.raises(DataError, match="the training text has 50 tokens; validation needs 51"):
        validation_sequences(file, 100, 8, least=50)


@pytest.mark.parametrize("per_shard", [None, 1, 2, 4])
def test_documents_of_sequences_are_those_of_the_shards(tmp_path: Path, per_shard: int | None) -> None:
    # Tokens count up, so that a sequence says where it is from.
    bounds = [0, 1, 5, 40, 41, 120, 121, 122, 260, 300]
    documents = [list(range(start, stop)) for start, stop in pairwise(bounds)]
    file = write_stream(tmp_path, documents, 300, per_shard)
    batches = TrainingBatches((file,), 16, 3, seed=1, documents="reset")
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
    concatenated = TrainingBatches((file,), 16, 3, seed=1, documents="concatenate")
    assert concatenated.num_valid_tokens(0) == 48
    assert torch.equal(concatenated.batch(7).tokens, batches.batch(7).tokens)


def test_how_tokens_are_cut_into_shards_has_no_effect(tmp_path: Path) -> None:
    batches = []
    for name, per_shard in (("one", None), ("many", 7), ("single", 1)):
        (tmp_path / name).mkdir()
        batches.append(TrainingBatches((tokens(tmp_path / name, 400, per_shard),), 16, 3, seed=1, documents="reset"))
    for step in range(20):
        one, *others = (each.batch(step) for each in batches)
        for other in others:
            assert torch.equal(other.tokens, one.tokens) and other.document_starts == one.document_starts


def mixture(path: Path, weights: tuple[float, ...], sizes: tuple[int, ...], **values: int) -> TrainingBatches:
    streams = []
    for number, size in enumerate(sizes):
        (path / str(number)).mkdir(exist_ok=True)
        # The thousands say which source it is.
        documents = [[1000 * number + token for token in range(size)]]
        streams.append(write_stream(path / str(number), documents, 10_000))
    arguments = {"seq_len": 8, "batch_sequences": 5, "seed": 0} | values
    return TrainingBatches(tuple(streams), **arguments, weights=weights)  # type: ignore[arg-type]


def test_a_mixture_has_the_share_of_each_source_and_goes_through_each_in_epochs(tmp_path: Path) -> None:
    batches = mixture(tmp_path, (3.0, 1.0), (900, 200))
    rows = torch.cat([batches.batch(step).tokens for step in range(400)])
    source = rows[:, 0] // 1000
    assert (rows // 1000 == source[:, None]).all()
    assert abs(float((source == 1).double().mean()) - 0.25) < 0.03
    for number, per_epoch in ((0, 899 // 8), (1, 199 // 8)):
        own = rows[source == number][:, 0]
        for epoch in range(len(own) // per_epoch):
            assert len(set(own[epoch * per_epoch : (epoch + 1) * per_epoch].tolist())) == per_epoch
    # The next block of sequences goes on with both.
    shares = batches._mixture(0)[0], batches._mixture(1)
    assert [int((shares[0] == number).sum()) for number in (0, 1)] == [3 * 2**14, 2**14]
    assert sorted(shares[1][1][shares[1][0] == 1].tolist()) == list(range(2**14, 2**15))


def test_a_mixture_is_a_function_of_seed_and_step(tmp_path: Path) -> None:
    batches = mixture(tmp_path, (3.0, 1.0), (900, 200))
    again = mixture(tmp_path, (3.0, 1.0), (900, 200))
    later = again.batch(13_200).tokens
    assert torch.equal(batches.batch(7).tokens, again.batch(7).tokens)
    assert torch.equal(torch.cat([batches.batch(7, 0, 2).tokens, batches.batch(7, 2).tokens]), again.batch(7).tokens)
    assert torch.equal(batches.batch(13_200).tokens, later)
    other = mixture(tmp_path, (3.0, 1.0), (900, 200), seed=1)
    assert not torch.equal(other.batch(7).tokens, batches.batch(7).tokens)


@pytest.mark.parametrize("weights", [(1.0, 1e-9), (1e-9, 1.0, 1e-9), (1.0,) * 7, (0.3, 0.3, 0.4), (5e8, 1.0)])
def test_shares_of_a_mixture_add_up_and_leave_no_source_out(weights: tuple[float, ...]) -> None:
    shares = _shares(weights)
    assert shares.sum() == 2**16 and shares.min() >= 1
    assert abs(shares / 2**16 - np.array(weights) / sum(weights)).max() < 1e-4


def test_a_mixture_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.weights has 1 numbers for 2 sources"):
        mixture(tmp_path, (1.0,), (900, 200))
    with pytest.raises(DataError, match=r"has 8 tokens, fewer than a sequence of 8 tokens and the one that follows"):
        mixture(tmp_path, (1.0, 1.0), (900, 8))
