"""A number hidden somewhere in a long text, which the text's end asks for: the needle and the passkey test.

    opening   filler ...   a sentence with the number   ... filler   question -> the number

The passkey test has the form of Landmark Attention's (arXiv 2305.16300): an opening that says what will be asked, and
five sentences that repeat as filler. The needle test has a text of the model's own kind as filler, and no opening, as "needle in a
haystack" tests have it; the name of the number and the number are drawn for each sample, as in RULER (arXiv 2404.06654). The
sentences are ours.

Shapes: N tokens of a prompt and its answer but for the last one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch

from longspan.data.packing import Documents, Sequences
from longspan.data.token_source import TokenSource
from longspan.data.tokenizer import Tokenizer
from longspan.errors import ConfigError, DataError
from longspan.evaluation.scores import score_rows
from longspan.train.ranks import Ranks
from longspan.train.sample import prompt_tokens
from longspan.train.step_batch import LayoutOf

Kind = Literal["needle", "passkey"]

_FILLER = "The lake is calm. The hills are far away. A boat goes by. It is getting late. The morning comes back. "
_NAMES = ("amber", "birch", "coral", "delta", "ember", "fjord", "grove", "heron", "ivory", "jasper", "kelp", "larch")


@dataclass(frozen=True)
class Form:
    """The parts of a test's text; ``{name}`` and ``{number}`` are drawn for each sample."""

    opening: str
    sentence: str
    question: str
    answer: str


FORMS: dict[Kind, Form] = {
    "needle": Form(
        opening="",
        sentence="\nThe secret number of {name} is {number}.\n",
        question="\nThe secret number of {name} is",
        answer=" {number}",
    ),
    "passkey": Form(
        opening="Somewhere in this text, most of which says nothing, there is a pass key. Find it and keep it in mind: you will be "
        "asked for it.\n",
        sentence="\nThe pass key is {number}. Keep it in mind: {number} is the pass key.\n",
        question="\nWhat is the pass key? The pass key is",
        answer=" {number}",
    ),
}


@dataclass(frozen=True)
class HiddenKeys:
    """Prompts of one kind for a tokenizer.

    text: what the needle test is filled with; tokens that stand for no text are left out. documents: how the model has seen
    documents begin.
    """

    kind: Kind
    tokenizer: Tokenizer
    documents: Documents
    seed: int
    text: TokenSource | None = None

    def sample(self, num_tokens: int, depth: float, index: int) -> Sequences:
        """A prompt with its answer, of `num_tokens` tokens and the one that follows; the answer alone is predicted.

        depth: where the sentence stands, as a share of the filler that is in front of it, 0 to 1. Number and name are a function of
        seed and index alone: those of every length and depth are the same.

        Raises:
            ConfigError: where the length has no room for more than the sentences.
            DataError: where there is no text to fill it with.
        """
        form = FORMS[self.kind]
        random = np.random.default_rng([self.seed, index])
        drawn = {"number": int(random.integers(10_000, 100_000)), "name": _NAMES[int(random.integers(len(_NAMES)))]}
        opening = prompt_tokens(self.tokenizer, form.opening, self.documents) if self._opens(form) else []
        sentence, question, answer = self.tokenizer.encode(
            [text.format(**drawn) for text in (form.sentence, form.question, form.answer)]
        )
        room = num_tokens + 1 - sum(map(len, (opening, sentence, question, answer)))
        if room < 1:
            raise ConfigError(
                f"lengths has {num_tokens}, in which there is no room: the sentences of the {self.kind} test alone take "
                f"{num_tokens + 1 - room} tokens. Take longer ones"
            )
        filler = self._filler(room, random)
        split = round(depth * room)
        tokens = [*opening, *filler[:split], *sentence, *filler[split:], *question, *answer]
        predicts = torch.zeros(1, num_tokens, dtype=torch.bool)
        predicts[0, num_tokens - len(answer) :] = True
        return Sequences(torch.tensor([tokens]), None, predicts)

    @cached_property
    def _is_text(self) -> np.ndarray:
        """Which tokens stand for text, bool ``[vocab_size]``."""
        return self.tokenizer.token_bytes > 0

    def _opens(self, form: Form) -> bool:
        """Whether anything stands in front: of an empty opening, at most the end of the document before."""
        return bool(form.opening) or self.documents == "concatenate"

    def _filler(self, count: int, random: np.random.Generator) -> list[int]:
        if self.kind == "passkey":
            once = self.tokenizer.encode([_FILLER])[0]
            return (once * (count // len(once) + 1))[:count]
        if self.text is None or not self.text.num_tokens:
            raise DataError("the needle test has no text to hide a needle in. Give prepared data that holds some")
        found: list[int] = []
        place = int(random.integers(self.text.num_tokens))
        num_read = 0
        while len(found) < count:
            if num_read >= self.text.num_tokens and not found:
                raise DataError(
                    f"{self.text.name} holds no text to hide a needle in. Give prepared data that holds some"
                )
            taken = self.text.read(place, min(place + 2 * count, self.text.num_tokens))
            found += taken[self._is_text[taken]].tolist()
            num_read += len(taken)
            # A short text is gone through again.
            place = (place + len(taken)) % self.text.num_tokens
        return found[:count]


@dataclass(frozen=True)
class HiddenKeyResult:
    """Of all samples of one length and depth.

    accuracy: share of the samples whose number greedy decoding writes. log_probability: mean of the answers', in nats.
    """

    num_tokens: int
    depth: float
    num_samples: int
    accuracy: float
    log_probability: float


def hidden_key_results(
    model: Any,
    keys: HiddenKeys,
    lengths: Sequence[int],
    depths: Sequence[float],
    num_samples: int,
    layout_of: LayoutOf,
    ranks: Ranks,
) -> Iterator[HiddenKeyResult]:
    """What the model finds at each length and depth, each prompt split over the ranks; the same on every rank.

    Raises:
        ConfigError, DataError: as `HiddenKeys.sample`, on every rank.
    """
    for num_tokens in lengths:
        for depth in depths:
            nats, right = 0.0, 0
            for index in range(num_samples):
                sample = ranks.together(lambda n=num_tokens, d=depth, i=index: keys.sample(n, d, i))  # type: ignore[misc]
                scores = score_rows(model, sample, layout_of, ranks)
                nats += float(scores.nats[0])
                right += int(scores.is_right[0])
            yield HiddenKeyResult(num_tokens, depth, num_samples, right / num_samples, -nats / num_samples)
