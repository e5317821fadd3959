"""A number is hidden where it is said to be, and found if greedy decoding writes it, on any ranks."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from longspan.data.token_source import TokensInMemory
from longspan.data.tokenizer import ByteTokenizer
from longspan.errors import ConfigError, DataError
from longspan.evaluation.hidden_keys import FORMS, HiddenKeyResult, HiddenKeys, Kind, hidden_key_results
from longspan.evaluation.scores import score_rows
from longspan.models import generate
from longspan.train.step_batch import layouts_over
from tests.evaluation.shared import MORE_RANKS_AND_ORDERS, RANKS_AND_ORDERS, byte_model, given_to_ranks
from tests.ranks import raised, run_on_ranks

LENGTHS, DEPTHS, SAMPLES = (250, 300), (0.0, 0.4, 1.0), 2
KINDS: tuple[Kind, ...] = ("needle", "passkey")


def text() -> TokensInMemory:
    random = np.random.default_rng(1)
    return TokensInMemory(
        "held-out text", [[*random.choice([97, 98, 32], length).tolist(), 256] for length in (30, 1, 50)]
    )


def keys(kind: Kind, documents: Any = "reset") -> HiddenKeys:
    return HiddenKeys(kind, ByteTokenizer(), documents, seed=5, text=text())


def written(tokens: torch.Tensor) -> str:
    return bytes(token for token in tokens.tolist() if token < 256).decode()


@pytest.mark.parametrize("kind", KINDS)
def test_the_number_stands_once_at_its_depth_and_is_asked_for_at_the_end(kind: Kind) -> None:
    whole = FORMS[kind].opening
    for depth in DEPTHS:
        for index in range(4):
            sample = keys(kind).sample(300, depth, index)
            assert sample.tokens.shape == (1, 301)
            shown = written(sample.tokens[0])
            number = shown[-5:]
            assert number.isdigit() and shown[-6] == " "
            assert written(sample.labels[0][sample.labels[0] >= 0]) == f" {number}"
            # Once, or twice in the sentence of the pass key, and in the answer.
            in_text = shown[:-6]
            assert in_text.count(number) == FORMS[kind].sentence.count("{number}")
            assert in_text.startswith(whole) and in_text.endswith(" is")
            sentence = in_text.index(number)
            before, behind = in_text[len(whole) : sentence], in_text[sentence:]
            assert (len(before) < 40) == (depth == 0.0)
            assert depth < 1.0 or len(behind) < 150


@pytest.mark.parametrize("kind", KINDS)
def test_samples_differ_by_index_and_seed_alone(kind: Kind) -> None:
    numbers = [
        written(keys(kind).sample(length, 0.5, index).tokens[0])[-5:] for length in LENGTHS for index in range(3)
    ]
    assert numbers[:3] == numbers[3:] and len(set(numbers)) == 3
    assert torch.equal(keys(kind).sample(250, 0.3, 1).tokens, keys(kind).sample(250, 0.3, 1).tokens)


def test_a_text_opens_as_training_has_documents_and_holds_no_end_of_one() -> None:
    assert (keys("needle").sample(250, 0.5, 0).tokens < 256).all()
    opened = keys("needle", "concatenate").sample(250, 0.5, 0).tokens[0]
    assert opened[0] == 256 and (opened[1:] < 256).all()
    assert keys("passkey", "concatenate").sample(250, 0.5, 0).tokens[0, 0] == 256


def results(kind: Kind, order: Any) -> list[HiddenKeyResult]:
    model, ranks = given_to_ranks(byte_model())
    return list(hidden_key_results(model, keys(kind), LENGTHS, DEPTHS, SAMPLES, layouts_over(ranks, order), ranks))


@lru_cache
def plain(kind: Kind) -> list[HiddenKeyResult]:
    """By the logits of each prompt alone, and by the tokens that greedy decoding writes."""
    model, found = byte_model(), []
    for length in LENGTHS:
        for depth in DEPTHS:
            log_probability, right = 0.0, 0
            for index in range(SAMPLES):
                tokens = keys(kind).sample(length, depth, index).tokens[0]
                with torch.no_grad():
                    logits = model(tokens[None, :-1])[0, -6:]
                log_probability -= float(F.cross_entropy(logits, tokens[-6:], reduction="sum"))
                right += list(generate(model, tokens[:-6], max_new_tokens=6)) == tokens[-6:].tolist()
            found.append(HiddenKeyResult(length, depth, SAMPLES, right / SAMPLES, log_probability / SAMPLES))
    return found


def check(kind: Kind, num_ranks: int, order: str) -> None:
    for got in run_on_ranks(num_ranks, results, kind, order):
        for ours, theirs in zip(got, plain(kind), strict=True):
            assert vars(ours) == pytest.approx(vars(theirs), rel=1e-10)


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^[12]-contiguous-needle$", r"^2-zigzag-passkey$")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_ranks", "order"), RANKS_AND_ORDERS)
def test_results_are_those_of_each_prompt_alone(kind: Kind, num_ranks: int, order: str) -> None:
    check(kind, num_ranks, order)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_ranks", "order"), MORE_RANKS_AND_ORDERS)
def test_results_are_those_of_each_prompt_alone_on_more_ranks(kind: Kind, num_ranks: int, order: str) -> None:
    check(kind, num_ranks, order)


def _scores_of_what_greedy_decoding_writes(order: Any) -> list[bool]:
    """Whether a prompt counts as found whose answer is what the model writes, and the same with another last token."""
    alone = byte_model()
    prompt = keys("needle").sample(200, 0.5, 0)
    answer = torch.tensor(list(generate(alone, prompt.tokens[0, :-6], max_new_tokens=6)))
    model, ranks = given_to_ranks(byte_model())
    found = []
    for last in (answer[-1], (answer[-1] + 1) % 256):
        prompt.tokens[0, -6:] = torch.cat([answer[:-1], last[None]])
        found.append(bool(score_rows(model, prompt, layouts_over(ranks, order), ranks).is_right[0]))
    return found


@pytest.mark.parametrize(("num_ranks", "order"), RANKS_AND_ORDERS)
def test_found_is_what_greedy_decoding_writes_to_the_last_token(num_ranks: int, order: str) -> None:
    assert run_on_ranks(num_ranks, _scores_of_what_greedy_decoding_writes, order) == [[True, False]] * num_ranks


def _too_short(kind: Kind) -> list[HiddenKeyResult]:
    model, ranks = given_to_ranks(byte_model())
    return list(hidden_key_results(model, keys(kind), (60,), (0.5,), 1, layouts_over(ranks, "zigzag"), ranks))


@pytest.mark.parametrize("kind", KINDS)
def test_a_length_without_room_is_refused_by_all(kind: Kind) -> None:
    for error, message in run_on_ranks(2, raised, _too_short, kind):
        assert (
            error == ConfigError.__name__
            and f"lengths has 60, in which there is no room: the sentences of the {kind}" in message
        )


def test_a_needle_needs_text() -> None:
    for nothing in (None, TokensInMemory("held-out text", [[256], [256]])):
        with pytest.raises(DataError, match="text to hide a needle in"):
            HiddenKeys("needle", ByteTokenizer(), "reset", 0, nothing).sample(200, 0.5, 0)
