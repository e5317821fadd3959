"""Sequences of associative recall ask for keys whose values stand before, and are a function of seed and number alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from longspan.data.packing import IGNORED, Sequences
from longspan.data.recall import FILL, RecallBatches, RecallTask
from longspan.errors import ConfigError

TASK = RecallTask(num_pairs=5, vocab_size=40, seq_len=37, seed=3)


@pytest.mark.parametrize(
    "task",
    [
        TASK,
        replace(TASK, seq_len=19),
        replace(TASK, seq_len=20, vocab_size=12),
        replace(TASK, num_pairs=1, vocab_size=4, seq_len=3),
        replace(TASK, seq_len=400, vocab_size=41, power=1.0),
    ],
    ids=str,
)
def test_each_query_is_a_key_of_the_sequence_and_its_value_follows(task: RecallTask) -> None:
    pairs = task.num_pairs
    for side in ("train", "validation"):
        found = task.sequences(side, range(20))
        assert found.tokens.shape == (20, task.seq_len + 1) and found.seq_len == task.seq_len
        assert found.num_valid_tokens == 20 * pairs
        for words, labels in zip(found.tokens.tolist(), found.labels.tolist(), strict=True):
            values = dict(zip(words[0 : 2 * pairs : 2], words[1 : 2 * pairs : 2], strict=True))
            assert len(values) == len(set(values.values())) == pairs
            half = task.vocab_size // 2
            assert all(0 < key < half <= value < task.vocab_size for key, value in values.items())
            asked = [place for place, label in enumerate(labels) if label != IGNORED]
            assert [labels[place] for place in asked] == [words[place + 1] for place in asked]
            assert len(asked) == pairs and all(values[words[place]] == words[place + 1] for place in asked)
            # Nowhere else is a key that might be asked for.
            assert [place for place in range(2 * pairs, len(words)) if words[place] in values] == asked
            assert min(asked) >= 2 * pairs and FILL not in values


@pytest.mark.parametrize("pairs", [2, 4])
def test_what_was_asked_before_tells_nothing_of_what_is_asked_next(pairs: int) -> None:
    """Whoever names a value that has not been an answer yet is right no more often than by chance."""
    found = replace(TASK, num_pairs=pairs).sequences("train", range(400))
    right, num_queries = 0, 0
    for words, labels in zip(found.tokens.tolist(), found.labels.tolist(), strict=True):
        values = words[1 : 2 * pairs : 2]
        answers = [label for label in labels if label != IGNORED]
        for number, answer in enumerate(answers):
            new = [value for value in values if value not in answers[:number]]
            right += answer == (new or values)[0]
            num_queries += 1
    # Of 800 and more draws: four deviations.
    assert abs(right / num_queries - 1 / pairs) < 4 * (1 / pairs * (1 - 1 / pairs) / num_queries) ** 0.5


def test_a_sequence_is_a_function_of_seed_side_and_number() -> None:
    first = TASK.sequences("train", [4, 9])
    again = RecallTask(5, 40, 37, 3).sequences("train", [9])
    assert torch.equal(first.tokens[1:], again.tokens)
    others = (
        TASK.sequences("train", [4]),
        TASK.sequences("validation", [9]),
        replace(TASK, seed=4).sequences("train", [9]),
    )
    assert not any(torch.equal(other.tokens, again.tokens) for other in others)


def test_a_batch_is_the_same_in_whatever_parts_it_is_taken() -> None:
    batches = RecallBatches(TASK, 6)
    whole = batches.batch(2)
    assert torch.equal(whole.tokens, TASK.sequences("train", range(12, 18)).tokens)
    parts = [batches.batch(2, first, 2) for first in (0, 2, 4)]
    assert torch.equal(torch.cat([part.tokens for part in parts]), whole.tokens)
    assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)
    assert batches.num_valid_tokens(2) == whole.num_valid_tokens == 30
    assert {int(power): int(count) for power, count in enumerate(batches.tokens_by_document_length(0)) if count} == {
        5: 6 * 37
    }


def test_most_queries_come_soon_and_with_power_one_anywhere() -> None:
    means = []
    for power in (0.01, 1.0):
        labels = replace(TASK, seq_len=400, power=power).sequences("train", range(200)).labels
        means.append(float((labels != IGNORED).nonzero()[:, 1].double().mean()))
    # Of places 10, 12, ..., 398 the mean is 204.
    assert means[0] < 140 and means[1] == pytest.approx(204, abs=10)


def test_words_may_be_tokens_of_a_text() -> None:
    words = np.arange(40) * 3 + 100
    plain, named = TASK.sequences("train", [0, 1]), TASK.sequences("train", [0, 1], words)
    assert torch.equal(named.tokens, plain.tokens * 3 + 100)
    assert torch.equal(named.labels != IGNORED, plain.labels != IGNORED)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"seq_len": 18},
            "a sequence of 18 tokens has no room for 5 pairs .* Take at most 4 pairs, or at least 19 tokens",
        ),
        ({"vocab_size": 11}, "a vocabulary of 11 words has 4 keys, and a sequence takes 5 .* Take at least 12 words"),
        ({"vocab_size": 1}, "a vocabulary of 1 words has 0 keys"),
        *(
            (
                {"power": power},
                f"a power of {power} leaves fewer places for queries than there are pairs, 5: .* nearer to 1",
            )
            for power in (float("nan"), float("inf"), -5000.0, 5000.0)
        ),
    ],
)
def test_what_has_no_room_for_the_pairs_is_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(TASK, **changes)


def test_fingerprints_tell_tasks_apart() -> None:
    changed = [
        replace(TASK, **change) for change in ({"num_pairs": 4}, {"power": 0.5}, {"seed": 9}, {"vocab_size": 41})
    ]
    assert len({task.fingerprint for task in [TASK, *changed]}) == 5


def test_parts_of_sequences_keep_what_is_asked_for() -> None:
    whole = TASK.sequences("train", range(4))
    assert torch.equal(whole.rows(1, 2).labels, whole.labels[1:3])
    short = whole.shortened(20)
    assert torch.equal(short.labels, whole.labels[:, :20])
    assert short.num_valid_tokens == int((whole.labels[:, :20] != IGNORED).sum())
    batch = whole.packed()
    assert batch.documents is None and batch.num_valid_tokens == 20
    assert torch.equal(batch.labels, whole.labels) and torch.equal(batch.inputs, whole.tokens[:, :-1])
    assert Sequences(whole.tokens).num_valid_tokens == 4 * 37
