"""Which tokens a step trains on: a function of the seed and the step, and of nothing else.

Sequences are numbered over the whole run; number i belongs to step i // B, whatever the ranks. With weights its source is drawn: of
every `_MIXTURE_BLOCK` sequences each source has its share, in random order. A source is then gone through in epochs of its own.

B: sequences in a global batch; N: tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from longspan.data.packing import Documents, Sequences
from longspan.data.token_source import TokenSource
from longspan.data.tokens import TokenStream
from longspan.errors import DataError

_MIXTURE_BLOCK = 2**16
"""Sequences among which the shares of sources are exact: to one part in as many."""


class Batches(Protocol):
    """What each step trains on, whatever it is made of."""

    @property
    def batch_sequences(self) -> int:
        """B."""
        ...

    def batch(self, step: int, first: int = 0, count: int | None = None) -> Sequences:
        """`count` sequences of the global batch of `step`, from number `first` on."""
        ...

    def num_valid_tokens(self, step: int) -> int:
        """Tokens of the global batch of `step` that have a label, the same on every rank."""
        ...

    def tokens_by_document_length(self, step: int) -> np.ndarray:
        """Tokens of `step`'s global batch by the length of their document, int64 ``[64]``: entry i counts 2^i to 2^(i+1) - 1."""
        ...


@dataclass(frozen=True)
class TrainingBatches:
    """Batches of `batch_sequences` random sequences of `seq_len` tokens and the token that follows each.

    An epoch of a stream cuts its tokens into sequences from a random start and goes through them in random order; sequences of an
    epoch do not overlap.

    streams: of the sources. weights: share of the sequences that each of them has, a positive number, in proportion to the
    others; None for a single stream.

    Raises:
        DataError: if there is less text than one global batch, or a stream has less than a sequence.
    """

    streams: tuple[TokenStream, ...]
    seq_len: int
    batch_sequences: int
    seed: int
    documents: Documents = "concatenate"
    weights: tuple[float, ...] | None = None
    _orders: tuple[Callable[[int], tuple[int, np.ndarray]], ...] = field(init=False, repr=False, compare=False)
    _mixture: Callable[[int], tuple[np.ndarray, np.ndarray]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if len(self.streams) != len(self.weights or (1.0,)):
            raise DataError(
                f"data.weights has {len(self.weights or ())} numbers for {len(self.streams)} sources. Give one for each"
            )
        found, needed = sum(stream.num_tokens for stream in self.streams), self.batch_sequences * self.seq_len + 1
        if found < needed:
            raise DataError(
                f"the training text has {found} tokens, fewer than one global batch of {self.batch_sequences} "
                f"sequences of {self.seq_len} tokens and the one that follows ({needed}). Give more text "
                "(data.source, data.max_bytes), or a smaller train.seq_len or train.batch_tokens"
            )
        for stream in self.streams:
            if stream.num_tokens <= self.seq_len:
                raise DataError(
                    f"{stream.name} has {stream.num_tokens} tokens, fewer than a sequence of {self.seq_len} tokens and the "
                    "one that "
                    "follows. Give more of it, leave it out, or take a smaller train.seq_len"
                )
        # Kept for two epochs: a batch may lie in both.
        mixed = self.weights is not None
        orders = [
            lru_cache(maxsize=2)(
                partial(_epoch_order, self.seed, number if mixed else None, stream.num_tokens, self.seq_len)
            )
            for number, stream in enumerate(self.streams)
        ]
        object.__setattr__(self, "_orders", tuple(orders))
        shares = _shares(self.weights or (1.0,))
        object.__setattr__(self, "_mixture", lru_cache(maxsize=2)(partial(_mixture_block, self.seed, shares)))

    def batch(self, step: int, first: int = 0, count: int | None = None) -> Sequences:
        """`count` sequences of the global batch of `step`, from number `first` on."""
        return read_sequences(self._places(step)[first:][:count], self.seq_len, self.documents)

    def num_valid_tokens(self, step: int) -> int:
        """Tokens of the global batch of `step` that have a label: from the documents' offsets alone, the same on every rank."""
        num_tokens = self.batch_sequences * self.seq_len
        if self.documents == "concatenate":
            return num_tokens
        return num_tokens - sum(
            len(stream.document_starts(start + 1, start + self.seq_len + 1)) for stream, start in self._places(step)
        )

    def tokens_by_document_length(self, step: int) -> np.ndarray:
        """Tokens of `step`'s global batch by the length of their document, int64 ``[64]``: entry i counts 2^i to 2^(i+1) - 1."""
        counts = np.zeros(64, dtype=np.int64)
        for stream, start in self._places(step):
            counts += _tokens_by_document_length(stream, start, start + self.seq_len)
        return counts

    def _places(self, step: int) -> list[tuple[TokenStream, int]]:
        """Stream and offset of each sequence of a global batch."""
        first = step * self.batch_sequences
        return [self._place(index) for index in range(first, first + self.batch_sequences)]

    def _place(self, index: int) -> tuple[TokenStream, int]:
        source = 0
        if self.weights is not None:
            block, within = divmod(index, _MIXTURE_BLOCK)
            sources, ordinals = self._mixture(block)
            source, index = int(sources[within]), int(ordinals[within])
        stream = self.streams[source]
        epoch, place = divmod(index, (stream.num_tokens - 1) // self.seq_len)
        offset, order = self._orders[source](epoch)
        return stream, offset + int(order[place]) * self.seq_len


def _epoch_order(seed: int, source: int | None, num_tokens: int, seq_len: int, epoch: int) -> tuple[int, np.ndarray]:
    """Where an epoch's first sequence starts, and the order of its sequences. source: None where there is but one stream."""
    random = np.random.default_rng([seed, epoch] if source is None else [seed, epoch, source + 1])
    num_sequences, spare = divmod(num_tokens - 1, seq_len)
    return int(random.integers(spare + 1)), random.permutation(num_sequences)


def _shares(weights: tuple[float, ...]) -> np.ndarray:
    """Sequences of each source in a block, int64: at least one of each, `_MIXTURE_BLOCK` in all."""
    exact = np.array(weights, dtype=np.float64) / sum(weights) * _MIXTURE_BLOCK
    shares = np.maximum(1, np.floor(exact).astype(np.int64))
    # What rounding has left goes to the largest remainders; what it took too much is the largest source's.
    left = _MIXTURE_BLOCK - int(shares.sum())
    shares[np.argsort(shares - exact, kind="stable")[: max(0, left)]] += 1
    shares[np.argmax(shares)] += min(0, left)
    return shares


def _mixture_block(seed: int, shares: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Source of each sequence of a block, and which of that source's sequences it is, counted from the run's start."""
    random = np.random.default_rng([seed, block, 2**32])
    sources = random.permutation(np.repeat(np.arange(len(shares)), shares))
    ordinals = np.empty(len(sources), dtype=np.int64)
    for source, share in enumerate(shares.tolist()):
        ordinals[sources == source] = block * share + np.arange(share)
    return sources, ordinals


def validation_sequences(
    stream: TokenSource, seq_len: int, max_sequences: int, least: int = 1, documents: Documents = "concatenate"
) -> Sequences:
    """Sequences spread evenly over a stream; a single shorter one if there is no whole one.

    Args:
        least: the shortest sequence that will do.

    Raises:
        DataError: if it has no sequence of `least` tokens and the one that follows.
    """
    starts, length = validation_starts(stream, seq_len, max_sequences, least)
    return read_sequences([(stream, start) for start in starts], length, documents)


def validation_starts(
    stream: TokenSource, seq_len: int, max_sequences: int, least: int = 1
) -> tuple[tuple[int, ...], int]:
    """Where the sequences of `validation_sequences` start in the stream, and their length; raises as it does."""
    available = stream.num_tokens - 1
    if available < least:
        raise DataError(
            f"{stream.name} has {available + 1} tokens; validation needs {least + 1}. Give more text, or hold out more "
            "of it (data.validation_fraction)"
        )
    length = min(seq_len, available)
    num_whole = available // length
    count = min(num_whole, max_sequences)
    return tuple(index * num_whole // count * length for index in range(count)), length


def read_sequences(places: Iterable[tuple[TokenSource, int]], seq_len: int, documents: Documents) -> Sequences:
    """The `seq_len` tokens from each place on, a stream and an offset in it, and the token that follows.

    Raises:
        DataError: if they are not what was prepared.
    """
    places = list(places)
    tokens = torch.stack([_tokens(stream, start, seq_len) for stream, start in places])
    if documents == "concatenate":
        return Sequences(tokens)
    inside = [stream.document_starts(start + 1, start + seq_len + 1) - start for stream, start in places]
    return Sequences(tokens, tuple(tuple(row.tolist()) for row in inside))


def _tokens(stream: TokenSource, start: int, length: int) -> Tensor:
    return torch.from_numpy(stream.read(start, start + length + 1))


def _tokens_by_document_length(stream: TokenStream, start: int, stop: int) -> np.ndarray:
    """Tokens ``[start, stop)`` by the length of their document: int64 ``[64]``, by powers of two."""
    bounds = stream.bounds_of_documents(start, stop)
    lengths = np.diff(bounds)
    seen = np.diff(bounds.clip(start, stop))
    # The exponent of frexp is one more than that of the power of two below.
    return np.bincount(np.frexp(lengths)[1] - 1, weights=seen, minlength=64).astype(np.int64)
