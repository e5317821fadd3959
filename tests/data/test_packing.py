"""Rows with documents become one packed row that says where they start, and which tokens have no next one."""

from __future__ import annotations

import pytest
import torch

from longspan.data.packing import IGNORED, PackedBatch, Sequences

# Two rows of five tokens and the one that follows: documents start at 2 and behind the first row, and at 1 in the second.
TOKENS = torch.tensor([[10, 11, 20, 21, 22, 30], [40, 50, 51, 52, 53, 54]])
ROWS = Sequences(TOKENS, ((2, 5), (1,)))


def test_labels_do_not_cross_the_end_of_a_document() -> None:
    assert ROWS.labels.tolist() == [[11, IGNORED, 21, 22, IGNORED], [IGNORED, 51, 52, 53, 54]]
    assert ROWS.num_valid_tokens == 7
    assert TOKENS[0].tolist() == [10, 11, 20, 21, 22, 30]


def test_rows_become_one_whose_documents_they_are() -> None:
    packed = ROWS.packed()
    assert packed.inputs.tolist() == [[10, 11, 20, 21, 22, 40, 50, 51, 52, 53]]
    assert packed.labels.tolist() == [ROWS.labels.flatten().tolist()]
    assert packed.documents == (0, 2, 5, 6, 10)
    assert (packed.seq_len, packed.num_valid_tokens) == (10, 7)


def test_one_row_of_one_document_is_no_packed_sequence() -> None:
    packed = Sequences(TOKENS[:1], ((),)).packed()
    assert packed.documents is None
    assert packed.labels.tolist() == [[11, 20, 21, 22, 30]]
    assert Sequences(TOKENS, ((), ())).packed().documents == (0, 5, 10)


def test_concatenated_rows_stay_rows() -> None:
    packed = Sequences(TOKENS).packed()
    whole = PackedBatch.of(TOKENS)
    for batch in (packed, whole):
        assert torch.equal(batch.inputs, TOKENS[:, :-1]) and torch.equal(batch.labels, TOKENS[:, 1:])
        assert (batch.documents, batch.num_valid_tokens) == (None, 10)


@pytest.mark.parametrize(
    ("length", "starts"), [(5, ((2, 5), (1,))), (4, ((2,), (1,))), (2, ((2,), (1,))), (1, ((), (1,)))]
)
def test_shorter_rows_have_the_documents_that_start_in_them(length: int, starts: tuple[tuple[int, ...], ...]) -> None:
    shorter = ROWS.shortened(length)
    assert torch.equal(shorter.tokens, TOKENS[:, : length + 1])
    assert shorter.document_starts == starts
    assert shorter.num_valid_tokens == int((shorter.labels != IGNORED).sum())


def test_part_of_the_rows() -> None:
    part = ROWS.rows(1, 1)
    assert torch.equal(part.tokens, TOKENS[1:]) and part.document_starts == ((1,),)
