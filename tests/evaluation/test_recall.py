"""Recall of a model is counted query by query, on any ranks."""

from __future__ import annotations

from dataclasses import astuple
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from longspan.data.tokenizer import ByteTokenizer
from longspan.errors import ConfigError
from longspan.evaluation.recall import RecallResult, recall_results, recall_tasks, words_of_text
from longspan.train.step_batch import layouts_over
from tests.evaluation.shared import MORE_RANKS_AND_ORDERS, RANKS_AND_ORDERS, byte_model, given_to_ranks
from tests.ranks import run_on_ranks

WORDS = words_of_text(ByteTokenizer())
TASKS = recall_tasks((40, 61), (2, 5), len(WORDS), seed=3, power=0.5)
NUM_SEQUENCES = 6


def results(order: Any) -> list[RecallResult]:
    model, ranks = given_to_ranks(byte_model())
    return list(recall_results(model, TASKS, NUM_SEQUENCES, WORDS, layouts_over(ranks, order), ranks))


@lru_cache
def plain() -> list[tuple[float, ...]]:
    """By the logits of each sequence alone, in the order of `RecallResult`'s fields."""
    model = byte_model()
    found: list[tuple[float, ...]] = []
    for task in TASKS:
        nats, right = [], []
        for index in range(NUM_SEQUENCES):
            sequence = task.sequences("validation", [index], WORDS)
            with torch.no_grad():
                logits = model(sequence.tokens[:, :-1])[0]
            for place in np.flatnonzero(sequence.labels[0] >= 0):
                answer = sequence.tokens[0, place + 1]
                nats.append(float(F.cross_entropy(logits[place], answer)))
                right.append(bool(logits[place].argmax() == answer))
        assert len(nats) == NUM_SEQUENCES * task.num_pairs
        found.append(
            (task.seq_len, task.num_pairs, len(nats), float(np.mean(nats)), float(np.mean(right)), 1 / task.num_pairs)
        )
    return found


def check(num_ranks: int, order: str) -> None:
    for got in run_on_ranks(num_ranks, results, order):
        for row, expected in zip(got, plain(), strict=True):
            assert astuple(row) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("num_ranks", "order"), RANKS_AND_ORDERS)
def test_results_are_those_of_each_sequence_alone(num_ranks: int, order: str) -> None:
    check(num_ranks, order)


@pytest.mark.slow
@pytest.mark.parametrize(("num_ranks", "order"), MORE_RANKS_AND_ORDERS)
def test_results_are_those_of_each_sequence_alone_on_more_ranks(num_ranks: int, order: str) -> None:
    check(num_ranks, order)


class _Copier(torch.nn.Module):
    """Knows all answers: the word behind the same word before; its logits are that."""

    def __call__(self, tokens: Any, layout: Any, labels: Any, token_scores: bool) -> Any:
        right = torch.zeros_like(labels, dtype=torch.bool)
        for row, place in (labels >= 0).nonzero().tolist():
            before = (tokens[row, :place] == tokens[row, place]).nonzero()[0, 0]
            right[row, place] = tokens[row, before + 1] == labels[row, place]
        return torch.where(labels >= 0, 0.25, 0.0), right


def _copied() -> list[RecallResult]:
    _, ranks = given_to_ranks(byte_model())
    return list(recall_results(_Copier(), TASKS, NUM_SEQUENCES, WORDS, layouts_over(ranks, "contiguous"), ranks))


def test_a_model_that_recalls_everything_has_it_all_right() -> None:
    for each in run_on_ranks(1, _copied)[0]:
        assert each.accuracy == 1.0 and each.nats == pytest.approx(0.25)


def test_words_of_a_text_are_those_that_stand_for_bytes() -> None:
    assert WORDS.tolist() == list(range(256))


def test_a_length_without_room_is_refused() -> None:
    with pytest.raises(ConfigError, match="a sequence of 14 tokens has no room for 4 pairs"):
        recall_tasks((32, 14), (2, 4), 64, 0, 0.01)
