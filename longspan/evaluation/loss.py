"""The loss of a text by how much of it the model has seen, and by the length of its documents.

Shapes: N tokens of a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from longspan.data.batches import read_sequences, validation_starts
from longspan.data.packing import IGNORED, Documents, Sequences
from longspan.data.token_source import TokenSource
from longspan.evaluation.scores import score_tokens_of
from longspan.train.loss import Evaluation
from longspan.train.ranks import Ranks
from longspan.train.step_batch import LayoutOf

_NUM_BINS = 64


@dataclass(frozen=True)
class LossTables:
    """A loss and its parts: entry i of a table is of 2^i to 2^(i+1) - 1 tokens; entries without tokens are left out.

    by_context: by the number of tokens, in the sequence and its document, from which a token is predicted. by_document_length: by
    the length of the document that the predicted token is of, all of it, wherever sequences cut it.
    """

    whole: Evaluation
    by_context: dict[int, Evaluation]
    by_document_length: dict[int, Evaluation]
    seq_len: int
    num_sequences: int


@dataclass(frozen=True)
class _Labels:
    """Of each token of a sequence, int64 ``[N]``: what its label is predicted from, and is of.

    context, document_length: the powers of two of the tables. num_bytes: of the label. is_there: bool, whether it has one.
    """

    context: np.ndarray
    document_length: np.ndarray
    num_bytes: np.ndarray
    is_there: np.ndarray


def loss_tables(
    model: Any,
    source: TokenSource,
    seq_len: int,
    max_sequences: int,
    documents: Documents,
    token_bytes: np.ndarray,
    layout_of: LayoutOf,
    ranks: Ranks,
) -> LossTables:
    """The loss on up to `max_sequences` sequences spread evenly over the source, each split over the ranks.

    Arguments are those of a run's validation: with its own, the loss is the run's validation loss. The same on every rank.

    Raises:
        DataError: on every rank, if the source has less than a token for each rank, or is not what was prepared.
    """
    starts, length = ranks.together(lambda: validation_starts(source, seq_len, max_sequences, ranks.sp))
    own = np.zeros((2, _NUM_BINS))
    num_tokens, num_bytes = (np.zeros((2, _NUM_BINS), dtype=np.int64) for _ in range(2))
    for start in starts:
        row = ranks.together(lambda start=start: read_sequences([(source, start)], length, documents))  # type: ignore[misc]
        labels = _labels(row, source, start, token_bytes)
        batch = row.packed()
        layout = layout_of(batch.seq_len, batch.documents)
        nats = score_tokens_of(model, batch, layout, ranks).nats[0].double().numpy()
        for number, bins in enumerate((labels.context, labels.document_length)):
            here = np.concatenate([bins[first:stop] for first, stop in layout.segments])
            own[number] += np.bincount(here, weights=nats, minlength=_NUM_BINS)
            there = bins[labels.is_there]
            num_tokens[number] += np.bincount(there, minlength=_NUM_BINS)
            num_bytes[number] += np.bincount(
                there, weights=labels.num_bytes[labels.is_there], minlength=_NUM_BINS
            ).astype(np.int64)
    nats = ranks.gather_numbers(own.flatten().tolist()).sum(0).view(2, _NUM_BINS).numpy()
    tables = [
        {
            power: Evaluation(float(nats[number, power]), int(count), int(num_bytes[number, power]))
            for power, count in enumerate(num_tokens[number])
            if count
        }
        for number in range(2)
    ]
    whole = Evaluation(float(nats[0].sum()), int(num_tokens[0].sum()), int(num_bytes[0].sum()))
    by_context, by_document_length = tables
    return LossTables(whole, by_context, by_document_length, length, len(starts))


def _labels(row: Sequences, source: TokenSource, start: int, token_bytes: np.ndarray) -> _Labels:
    length = row.seq_len
    begins = np.zeros(length, dtype=np.int64)
    for begin in (row.document_starts or ((),))[0]:
        begins[begin:] = begin
    labels = row.labels[0].numpy()
    is_there = labels != IGNORED
    bounds = source.bounds_of_documents(start + 1, start + length + 1)
    lengths = np.repeat(np.diff(bounds), np.diff(bounds.clip(start + 1, start + length + 1)))
    return _Labels(
        context=_power_of_two(np.arange(length) - begins + 1),
        document_length=_power_of_two(lengths),
        num_bytes=np.where(is_there, token_bytes[labels * is_there], 0),
        is_there=is_there,
    )


def _power_of_two(numbers: np.ndarray) -> np.ndarray:
    """The exponent of the power of two below."""
    # That of frexp is one more.
    return np.frexp(numbers)[1].astype(np.int64) - 1
