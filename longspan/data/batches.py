"""Which tokens a step trains on: a function of the seed and the step, and of nothing else.

B: sequences in a global batch; N: tokens of a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

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

    def __post_init__(self) -> None:
        needed = self.batch_sequences * self.seq_len + 1
        found = self.file.info.num_tokens
        if found < needed:
            raise DataError(
                f"the training text has {found} tokens, fewer than one global batch of {self.batch_sequences} "
                f"sequences of {self.seq_len} tokens and the one that follows ({needed}). Give more text "
                "(data.source, data.max_bytes), or a smaller train.seq_len or train.batch_tokens"
            )

    @property
    def sequences_per_epoch(self) -> int:
        return (self.file.info.num_tokens - 1) // self.seq_len

    def batch(self, step: int, first: int = 0, count: int | None = None) -> Tensor:
        """Tokens of `count` sequences of the global batch of `step`, from number `first` on, int64 ``[count, N + 1]``."""
        count = self.batch_sequences - first if count is None else count
        start = step * self.batch_sequences + first
        return torch.stack([self._sequence(index) for index in range(start, start + count)])

    def _sequence(self, index: int) -> Tensor:
        epoch, place = divmod(index, self.sequences_per_epoch)
        spare = (self.file.info.num_tokens - 1) % self.seq_len
        offset, order = _epoch_order(self.seed, epoch, self.sequences_per_epoch, spare)
        return _tokens(self.file, offset + int(order[place]) * self.seq_len, self.seq_len)


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, num_sequences: int, spare: int) -> tuple[int, np.ndarray]:
    """Where the epoch's first sequence starts, and the order of its sequences."""
    random = np.random.default_rng([seed, epoch])
    return int(random.integers(spare + 1)), random.permutation(num_sequences)


def validation_sequences(file: TokenFile, seq_len: int, max_sequences: int, least: int = 1) -> Tensor:
    """Sequences spread evenly over a file, int64 ``[n, N + 1]``; a single shorter one if there is no whole one.

    Args:
        least: the shortest sequence that will do.

    Raises:
        DataError: if the file has no sequence of `least` tokens and the one that follows.
    """
    available = file.info.num_tokens - 1
    if available < least:
        raise DataError(
            f"{file.path} has {available + 1} tokens; validation needs {least + 1}. Give more text, or hold out more "
            "of it (data.validation_fraction)"
        )
    length = min(seq_len, available)
    num_whole = available // length
    count = min(num_whole, max_sequences)
    return torch.stack([_tokens(file, index * num_whole // count * length, length) for index in range(count)])


def _tokens(file: TokenFile, start: int, length: int) -> Tensor:
    return torch.from_numpy(file.tokens[start : start + length + 1].astype(np.int64))
