"""Multi-query associative recall, made on the spot: the task of Zoology (arXiv 2312.04927).

A sequence first pairs keys with values, then asks for a key as many times as there are pairs, each time for any of them:

    k1 v1  k2 v2  ...  kP vP   . . .  k2 v2  . .  k7 v7  . . . .  k2 v2  ...

and only the values behind the queries are predicted. No key, and no value, is there twice among the pairs. Between the queries
stand random words that are no key of the sequence. A query comes n places of two tokens behind the pairs with a probability in
proportion to n^(power - 1): most come soon, a few late.

In the authors' data each key is asked for once, the word behind a query is a random one, and the value its label alone. Here the
value stands there, so that a label is the next token, as in text. Were each key asked for once, that would tell about the other
answers: who names a value that has not been an answer yet is right (1 + 1/2 + ... + 1/P) / P of the time, and models learn that
before they recall. As any key may be asked for again, what was asked before tells nothing of what is asked next.

Shapes: N tokens of a sequence, P pairs, V words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import torch

from longspan.data.files import canonical, digest
from longspan.data.packing import Sequences
from longspan.errors import ConfigError

Side = Literal["train", "validation"]
_STREAMS: dict[Side, int] = {"train": 0, "validation": 1}
_FORM = 2
"""Of the sequences; another number where the same task has others. In form 1 each key was asked for once."""
FILL = 0
"""The word that stands where a random one would be a key of the sequence."""


@dataclass(frozen=True)
class RecallTask:
    """Sequences of `seq_len` tokens and the one that follows, with `num_pairs` pairs of words 0 to `vocab_size` - 1.

    Word 0 is neither key nor value; keys are of the lower half of the others, values of the upper one. power: as in the module.

    Raises:
        ConfigError: where a sequence or the vocabulary has no room for the pairs, or the power none for the queries.
    """

    num_pairs: int
    vocab_size: int
    seq_len: int
    seed: int
    power: float = 0.01

    def __post_init__(self) -> None:
        if self.seq_len + 1 < 4 * self.num_pairs:
            raise ConfigError(
                f"a sequence of {self.seq_len} tokens has no room for {self.num_pairs} pairs and as many queries with their "
                f"values. Take at most {(self.seq_len + 1) // 4} pairs, or at least {4 * self.num_pairs - 1} tokens"
            )
        if self._num_keys < self.num_pairs:
            raise ConfigError(
                f"a vocabulary of {self.vocab_size} words has {max(0, self._num_keys)} keys, and a sequence takes {self.num_pairs} "
                f"different ones. Take at least {2 * self.num_pairs + 2} words, or fewer pairs"
            )
        likely = self._probabilities()
        if not np.isfinite(likely).all() or np.count_nonzero(likely) < self.num_pairs:
            raise ConfigError(
                f"a power of {self.power} leaves fewer places for queries than there are pairs, {self.num_pairs}: the others have "
                "a probability of 0, or none. Take a number nearer to 1, with which all places are alike; the authors' is 0.01"
            )

    @property
    def _num_keys(self) -> int:
        return self.vocab_size // 2 - 1

    @property
    def chance(self) -> float:
        """Accuracy of a model that names one of the sequence's values at random."""
        return 1.0 / self.num_pairs

    @property
    def fingerprint(self) -> str:
        """A checksum of all that decides the sequences."""
        return digest(canonical(asdict(self) | {"form": _FORM}))

    def sequences(self, side: Side, indices: Sequence[int], words: np.ndarray | None = None) -> Sequences:
        """The sequences of these numbers: a function of the task, the side and the number alone.

        words: token ids ``[V]`` to write instead of the words 0 to V - 1.
        """
        made = [self._sequence(side, index) for index in indices]
        tokens = np.stack([sequence for sequence, _ in made])
        predicts = torch.from_numpy(np.stack([asks for _, asks in made]))
        return Sequences(torch.from_numpy(tokens if words is None else words[tokens]), None, predicts)

    def _probabilities(self) -> np.ndarray:
        """Of each place of two tokens behind the pairs, that a query stands there; no numbers for a power that gives none."""
        num_places = (self.seq_len + 1 - 2 * self.num_pairs) // 2
        with np.errstate(all="ignore"):
            weights = np.arange(1, num_places + 1, dtype=np.float64) ** (self.power - 1.0)
            likely: np.ndarray = weights / weights.sum()
        return likely

    def _sequence(self, side: Side, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Words int64 ``[N + 1]``, and which of the first N are queries."""
        random = np.random.default_rng([self.seed, _STREAMS[side], index])
        half, num_context = self.vocab_size // 2, 2 * self.num_pairs
        keys = 1 + random.choice(self._num_keys, self.num_pairs, replace=False)
        values = half + random.choice(self.vocab_size - half, self.num_pairs, replace=False)
        words = random.integers(self.vocab_size, size=self.seq_len + 1)
        words[np.isin(words, keys)] = FILL
        words[0:num_context:2], words[1:num_context:2] = keys, values
        likely = self._probabilities()
        places = random.choice(len(likely), self.num_pairs, replace=False, p=likely)
        queries = num_context + 2 * places
        asked = random.integers(self.num_pairs, size=self.num_pairs)
        words[queries], words[queries + 1] = keys[asked], values[asked]
        asks = np.zeros(self.seq_len, dtype=np.bool_)
        asks[queries] = True
        return words, asks


@dataclass(frozen=True)
class RecallBatches:
    """Batches of `batch_sequences` sequences of a task: sequence i of the run is the task's number i, on any mesh."""

    task: RecallTask
    batch_sequences: int

    def batch(self, step: int, first: int = 0, count: int | None = None) -> Sequences:
        """`count` sequences of the global batch of `step`, from number `first` on."""
        start = step * self.batch_sequences
        return self.task.sequences("train", range(start, start + self.batch_sequences)[first:][:count])

    def num_valid_tokens(self, step: int) -> int:
        """Tokens that have a label, the same in each step: as many as there are pairs."""
        return self.batch_sequences * self.task.num_pairs

    def tokens_by_document_length(self, step: int) -> np.ndarray:
        """A sequence is a document: int64 ``[64]``, as in `Batches`."""
        counts = np.zeros(64, dtype=np.int64)
        counts[self.task.seq_len.bit_length() - 1] = self.batch_sequences * self.task.seq_len
        return counts
