"""The loss by position and by document length is what a plain computation gives, on any ranks."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from longspan.data.token_source import TokensInMemory
from longspan.data.tokenizer import ByteTokenizer
from longspan.errors import DataError
from longspan.evaluation.loss import LossTables, loss_tables
from longspan.train.step_batch import layouts_over
from tests.evaluation.shared import MORE_RANKS_AND_ORDERS, RANKS_AND_ORDERS, byte_model, given_to_ranks
from tests.ranks import raised, run_on_ranks

SEQ_LEN, SEQUENCES = 50, 3
LENGTHS = (1, 20, 3, 70, 2, 9, 64, 31)
Row = tuple[float, int, int]


def source() -> TokensInMemory:
    random = np.random.default_rng(0)
    documents = [[*random.integers(256, size=length - 1).tolist(), 256] for length in LENGTHS]
    return TokensInMemory("a text", documents)


def tables(order: Any, documents: Any, seq_len: int = SEQ_LEN) -> LossTables:
    model, ranks = given_to_ranks(byte_model())
    token_bytes = ByteTokenizer().token_bytes
    return loss_tables(model, source(), seq_len, SEQUENCES, documents, token_bytes, layouts_over(ranks, order), ranks)


@lru_cache
def plain(documents: str) -> tuple[dict[int, Row], dict[int, Row]]:
    """Nats, tokens and bytes by tokens seen and by the length of the document, token by token."""
    model = byte_model()
    tokens, starts = source().read(0, sum(LENGTHS)), np.cumsum([0, *LENGTHS]).tolist()
    found: tuple[dict[int, Row], dict[int, Row]] = ({}, {})
    num_whole = (len(tokens) - 1) // SEQ_LEN
    for number in range(SEQUENCES):
        first = number * num_whole // SEQUENCES * SEQ_LEN
        for place in range(first, first + SEQ_LEN):
            document = max(index for index, start in enumerate(starts[:-1]) if start <= place + 1)
            begin = first
            if documents == "reset":
                begin = max(first, starts[max(index for index, start in enumerate(starts[:-1]) if start <= place)])
                if place + 1 in starts:
                    continue
            with torch.no_grad():
                logits = model(torch.from_numpy(tokens[begin : place + 1])[None])[0, -1]
            nats = float(F.cross_entropy(logits, torch.tensor(int(tokens[place + 1]))))
            for table, size in zip(found, (place + 1 - begin, LENGTHS[document]), strict=True):
                power = size.bit_length() - 1
                before = table.get(power, (0.0, 0, 0))
                table[power] = (before[0] + nats, before[1] + 1, before[2] + int(tokens[place + 1] < 256))
    return found


def check(num_ranks: int, order: str, documents: str) -> None:
    want = plain(documents)
    for got in run_on_ranks(num_ranks, tables, order, documents):
        assert (got.seq_len, got.num_sequences) == (SEQ_LEN, SEQUENCES)
        for table, expected in zip((got.by_context, got.by_document_length), want, strict=True):
            assert table.keys() == expected.keys()
            for power, (nats, num_tokens, num_bytes) in expected.items():
                assert table[power].nats == pytest.approx(nats, rel=1e-10)
                assert (table[power].num_tokens, table[power].num_bytes) == (num_tokens, num_bytes)
        assert got.whole.nats == pytest.approx(sum(nats for nats, _, _ in want[0].values()), rel=1e-10)
        assert got.whole.num_tokens == sum(count for _, count, _ in want[1].values())
        assert got.whole.num_bytes == sum(count for _, _, count in want[1].values())


@pytest.mark.slow_rows(r"^1-.*-concatenate$")
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^2-contiguous-concatenate$")
@pytest.mark.parametrize("documents", ["reset", "concatenate"])
@pytest.mark.parametrize(("num_ranks", "order"), RANKS_AND_ORDERS)
def test_tables_are_those_of_a_plain_computation(num_ranks: int, order: str, documents: str) -> None:
    check(num_ranks, order, documents)


@pytest.mark.slow
@pytest.mark.parametrize("documents", ["reset", "concatenate"])
@pytest.mark.parametrize(("num_ranks", "order"), MORE_RANKS_AND_ORDERS)
def test_tables_are_those_of_a_plain_computation_on_more_ranks(num_ranks: int, order: str, documents: str) -> None:
    check(num_ranks, order, documents)


def test_a_text_shorter_than_a_sequence_is_one() -> None:
    (got,) = run_on_ranks(1, tables, "contiguous", "concatenate", 10_000)
    assert (got.seq_len, got.num_sequences) == (sum(LENGTHS) - 1, 1)
    assert got.whole.num_tokens == sum(LENGTHS) - 1


def _tables_of_two_tokens() -> LossTables:
    model, ranks = given_to_ranks(byte_model())
    two = TokensInMemory("a short text", [[65, 256]])
    token_bytes = ByteTokenizer().token_bytes
    return loss_tables(model, two, 4, 1, "reset", token_bytes, layouts_over(ranks, "zigzag"), ranks)


def test_a_text_of_fewer_tokens_than_ranks_is_refused_by_all() -> None:
    for kind, message in run_on_ranks(2, raised, _tables_of_two_tokens):
        assert kind == DataError.__name__ and "a short text has 2 tokens; validation needs 3" in message


def test_documents_in_memory_are_found_like_those_of_a_stream() -> None:
    text = source()
    starts = np.cumsum([0, *LENGTHS])
    assert text.num_tokens == starts[-1]
    assert text.document_starts(1, 24).tolist() == [1, 21]
    assert text.document_starts(0, 25).tolist() == [0, 1, 21, 24]
    assert text.bounds_of_documents(0, 1).tolist() == [0, 1]
    assert text.bounds_of_documents(5, 22).tolist() == [1, 21, 24]
    assert text.bounds_of_documents(21, 24).tolist() == [21, 24]
    with pytest.raises(DataError, match="nothing has no documents"):
        TokensInMemory("nothing", [])
