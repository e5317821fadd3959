"""Which tokens a step trains on: a function of the seed and the step, and of nothing else.

B: sequences in a global batch; N: tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from longspan.data.packing import Documents, Sequences
from longspan.data.tokens import TokenFile
from longspan.errors import DataError


@dataclass(frozen=True)
class TrainingBatches:
    """Batches of `batch_sequences` random sequences of `seq_len` tokens and the token that follows each.

    An epoch cuts the tokens into sequences from a random start and goes through them in random order; sequences of an
    epoch do not overlap.

    Raises:
        DataError: if the file is shorter than one global batch.
    """

    file: TokenFile
    seq_len: int
    batch_sequences: int
    seed: int
    documents: Documents = "concatenate"

    def __post_init__(self) -> None:
        needed = self.batch_sequences * self.seq_len + 1
        found = self.file.num_tokens
        if found < needed:
            raise DataError(
                f"the training text has {found} tokens, fewer than one global batch of {self.batch_sequences} "
                f"sequences of {self.seq_len} tokens and the one that follows ({needed}). Give more text "
                "(data.source, data.max_bytes), or a smaller train.seq_len or train.batch_tokens"
            )

    @property
    def sequences_per_epoch(self) -> int:
        return (self.file.num_tokens - 1) // self.seq_len

    def batch(self, step: int, first: int = 0, count: int | None = None) -> Sequences:
        """`count` sequences of the global batch of `step`, from number `first` on."""
        return read_sequences(self.file, self._starts(step)[first:][:count], self.seq_len, self.documents)

    def num_valid_tokens(self, step: int) -> int:
        """Tokens of the global batch of `step` that have a label: from the documents' offsets alone, the same on every rank."""
        num_tokens = self.batch_sequences * self.seq_len
        if self.documents == "concatenate":
            return num_tokens
        return num_tokens - sum(
            len(self.file.document_starts(start + 1, start + self.seq_len + 1)) for start in self._starts(step)
        )

    def tokens_by_document_length(self, step: int) -> np.ndarray:
        """Tokens of `step`'s global batch by the length of their document, int64 ``[64]``: entry i counts 2^i to 2^(i+1) - 1."""
        counts = np.zeros(64, dtype=np.int64)
        for start in self._starts(step):
            counts += _tokens_by_document_length(self.file, start, start + self.seq_len)
        return counts

    def _starts(self, step: int) -> list[int]:
        """Offset of each sequence of a global batch."""
        first = step * self.batch_sequences
        return [self._start(index) for index in range(first, first + self.batch_sequences)]

    def _start(self, index: int) -> int:
        epoch, place = divmod(index, self.sequences_per_epoch)
        spare = (self.file.num_tokens - 1) % self.seq_len
        offset, order = _epoch_order(self.seed, epoch, self.sequences_per_epoch, spare)
        return offset + int(order[place]) * self.seq_len


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, num_sequences: int, spare: int) -> tuple[int, np.ndarray]:
    """Where the epoch's first sequence starts, and the order of its sequences."""
    random = np.random.default_rng([seed, epoch])
    return int(random.integers(spare + 1)), random.permutation(num_sequences)


def validation_sequences(
    file: TokenFile, seq_len: int, max_sequences: int, least: int = 1, documents: Documents = "concatenate"
) -> Sequences:
    """Sequences spread evenly over a file; a single shorter one if there is no whole one.

    Args:
        least: the shortest sequence that will do.

    Raises:
        DataError: if the file has no sequence of `least` tokens and the one that follows.
    """
    available = file.num_tokens - 1
    if available < least:
        raise DataError(
            f"{file.path} has {available + 1} tokens; validation needs {least + 1}. Give more text, or hold out more "
            "of it (data.validation_fraction)"
        )
    length = min(seq_len, available)
    num_whole = available // length
    count = min(num_whole, max_sequences)
    return read_sequences(file, [index * num_whole // count * length for index in range(count)], length, documents)


def read_sequences(file: TokenFile, starts: Iterable[int], seq_len: int, documents: Documents) -> Sequences:
    """The `seq_len` tokens from each of the offsets `starts` on, and the token that follows."""
    starts = list(starts)
    tokens = torch.stack([_tokens(file, start, seq_len) for start in starts])
    if documents == "concatenate":
        return Sequences(tokens)
    inside = [file.document_starts(start + 1, start + seq_len + 1) - start for start in starts]
    return Sequences(tokens, tuple(tuple(row.tolist()) for row in inside))


def _tokens(file: TokenFile, start: int, length: int) -> Tensor:
    return torch.from_numpy(file.read(start, start + length + 1))


def _tokens_by_document_length(file: TokenFile, start: int, stop: int) -> np.ndarray:
    """Tokens ``[start, stop)`` by the length of their document: int64 ``[64]``, by powers of two."""
    bounds = file.bounds_of_documents(start, stop)
    lengths = np.diff(bounds)
    seen = np.diff(bounds.clip(start, stop))
    # The exponent of frexp is one more than that of the power of two below.
    return np.bincount(np.frexp(lengths)[1] - 1, weights=seen, minlength=64).astype(np.int64)
