"""Rows of tokens with the documents in them, and the one packed sequence that a forward takes.

B: rows; N: tokens of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Documents = Literal["reset", "concatenate"]
"""What happens where a document ends: memory, attention and positions start anew; or nothing does."""

IGNORED = -100
"""Label of a token that has no next one, as of `torch.nn.functional.cross_entropy`."""


@dataclass(frozen=True)
class PackedBatch:
    """What one forward takes, of whole sequences: a layout then splits it.

    inputs: int64 ``[1, B · N]``, rows one after another, where there are documents; else ``[B, N]``. labels: of the same shape, the
    token that follows each, or `IGNORED`. documents: global cu_seqlens of the packed row, row ends included; None where nothing
    is reset. num_valid_tokens: of labels that are not ignored.
    """

    inputs: Tensor
    labels: Tensor
    documents: tuple[int, ...] | None
    num_valid_tokens: int

    @classmethod
    def of(cls, tokens: Tensor) -> PackedBatch:
        """Whole sequences ``[B, N + 1]``, each with the token that follows it, and no documents."""
        return cls(tokens[:, :-1], tokens[:, 1:], None, tokens[:, 1:].numel())

    @property
    def seq_len(self) -> int:
        """Tokens of a row of `inputs`."""
        return self.inputs.shape[1]

    def to(self, device: torch.device) -> PackedBatch:
        """The same on `device`; a copy from pinned memory does not hold up the host."""
        inputs, labels = (x.to(device, non_blocking=True) for x in (self.inputs, self.labels))
        return PackedBatch(inputs, labels, self.documents, self.num_valid_tokens)

    def pinned(self) -> PackedBatch:
        """The same in memory that a GPU copies from by itself."""
        return PackedBatch(self.inputs.pin_memory(), self.labels.pin_memory(), self.documents, self.num_valid_tokens)


@dataclass(frozen=True)
class Sequences:
    """Rows of consecutive tokens, each with the token that follows.

    tokens: int64 ``[B, N + 1]``. document_starts: for each row, increasing, which of its tokens 1 to N start a document; None where
    documents are concatenated. A document that began before the row, or goes on behind it, is cut there. predicts: bool ``[B, N]``,
    which tokens have a label, where a task asks for some alone; None where a text is predicted.
    """

    tokens: Tensor
    document_starts: tuple[tuple[int, ...], ...] | None = None
    predicts: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def seq_len(self) -> int:
        """N."""
        return self.tokens.shape[1] - 1

    @property
    def num_valid_tokens(self) -> int:
        """Tokens that have a label: all but the last of each document, or those that a task asks for."""
        if self.predicts is not None:
            return int(self.predicts.sum())
        return self.tokens[:, 1:].numel() - sum(len(starts) for starts in self.document_starts or ())

    @property
    def labels(self) -> Tensor:
        """The token that follows each, int64 ``[B, N]``; `IGNORED` for the last of a document, and for what no task asks for."""
        labels = self.tokens[:, 1:]
        if self.predicts is not None:
            return labels.masked_fill(~self.predicts, IGNORED)
        if any(self.document_starts or ()):
            labels = labels.clone()
            for row, starts in enumerate(self.document_starts or ()):
                labels[row, [start - 1 for start in starts]] = IGNORED
        return labels

    def rows(self, first: int, count: int) -> Sequences:
        """`count` rows from number `first` on."""
        starts, predicts = self.document_starts, self.predicts
        return Sequences(
            self.tokens[first : first + count],
            None if starts is None else starts[first : first + count],
            None if predicts is None else predicts[first : first + count],
        )

    def shortened(self, seq_len: int) -> Sequences:
        """The first `seq_len` tokens of each row, and the one that follows."""
        starts = self.document_starts
        if starts is not None:
            starts = tuple(tuple(start for start in row if start <= seq_len) for row in starts)
        return Sequences(
            self.tokens[:, : seq_len + 1], starts, None if self.predicts is None else self.predicts[:, :seq_len]
        )

    def packed(self) -> PackedBatch:
        """All rows as one forward takes them.

        With documents the rows become one, whose documents they are: an operator takes packed documents in one row, and one long
        row exchanges once where B rows would exchange B times.
        """
        inputs, labels = self.tokens[:, :-1], self.labels
        if self.document_starts is None:
            return PackedBatch(inputs, labels, None, self.num_valid_tokens)
        length = self.seq_len
        bounds = [
            row * length + start
            for row, starts in enumerate(self.document_starts)
            for start in (0, *starts)
            if start < length
        ]
        documents = (*bounds, len(self) * length)
        return PackedBatch(
            inputs.reshape(1, -1),
            labels.reshape(1, -1),
            documents if len(documents) > 2 else None,
            self.num_valid_tokens,
        )
