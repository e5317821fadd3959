"""Multi-query associative recall of a trained model, by the number of pairs and the length: see `longspan.data.recall`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from longspan.data.recall import RecallTask
from longspan.data.tokenizer import Tokenizer
from longspan.evaluation.scores import score_rows
from longspan.train.ranks import Ranks
from longspan.train.step_batch import LayoutOf

_TOKENS_AT_ONCE = 2**14


@dataclass(frozen=True)
class RecallResult:
    """Of the queries of all sequences of one length and number of pairs.

    nats: mean cross-entropy of an answer. accuracy: share of the answers that are the likeliest token. chance: that of naming one
    of the sequence's values at random.
    """

    seq_len: int
    num_pairs: int
    num_queries: int
    nats: float
    accuracy: float
    chance: float


def words_of_text(tokenizer: Tokenizer) -> np.ndarray:
    """Tokens of a text's vocabulary that may stand for words of a task, int64: those that stand for bytes."""
    return np.flatnonzero(tokenizer.token_bytes)


def recall_tasks(
    lengths: Sequence[int], pairs: Sequence[int], vocab_size: int, seed: int, power: float
) -> list[RecallTask]:
    """A task for each length and number of pairs, the shortest first.

    Raises:
        ConfigError: where a length or the vocabulary has no room for the pairs.
    """
    return [RecallTask(count, vocab_size, length, seed, power) for length in lengths for count in pairs]


def recall_results(
    model: Any,
    tasks: Sequence[RecallTask],
    num_sequences: int,
    words: np.ndarray | None,
    layout_of: LayoutOf,
    ranks: Ranks,
) -> Iterator[RecallResult]:
    """What the model recalls of `num_sequences` held-out sequences of each task, each split over the ranks.

    words: token ids that stand for the words of the tasks; None is the words themselves.
    """
    for task in tasks:
        sequences = task.sequences("validation", range(num_sequences), words)
        scores = score_rows(model, sequences, layout_of, ranks, max(1, _TOKENS_AT_ONCE // task.seq_len))
        count = int(scores.num_labels.sum())
        yield RecallResult(
            seq_len=task.seq_len,
            num_pairs=task.num_pairs,
            num_queries=count,
            nats=float(scores.nats.sum()) / count,
            accuracy=int(scores.num_right.sum()) / count,
            chance=task.chance,
        )
