"""Tokens one after another, and the documents that they make: what batches are read from, and such tokens in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from longspan.errors import DataError


class TokenSource(Protocol):
    """Tokens of documents that follow one another, as a `TokenStream` has them.

    name: what messages call it.
    """

    name: str

    @property
    def num_tokens(self) -> int: ...

    def read(self, start: int, stop: int) -> np.ndarray:
        """A copy of the tokens ``[start, stop)``, int64."""
        ...

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Offsets at which a document starts, among ``[start, stop)``, int64."""
        ...

    def bounds_of_documents(self, start: int, stop: int) -> np.ndarray:
        """Where each document that has a token in ``[start, stop)`` starts, and where the last of them ends, int64."""
        ...


class TokensInMemory:
    """Documents that were tokenized a moment ago.

    documents: the tokens of each, at least one.

    Raises:
        DataError: where there is no document.
    """

    def __init__(self, name: str, documents: Sequence[Sequence[int]]) -> None:
        if not documents:
            raise DataError(f"{name} has no documents. Give some text")
        self.name = name
        self._tokens = np.concatenate([np.asarray(document, dtype=np.int64) for document in documents])
        self._bounds = np.cumsum([0, *map(len, documents)], dtype=np.int64)

    @property
    def num_tokens(self) -> int:
        return len(self._tokens)

    def read(self, start: int, stop: int) -> np.ndarray:
        """As `TokenSource.read`."""
        return self._tokens[start:stop].copy()

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """As `TokenSource.document_starts`."""
        starts = self._bounds[:-1]
        return starts[(starts >= start) & (starts < stop)]

    def bounds_of_documents(self, start: int, stop: int) -> np.ndarray:
        """As `TokenSource.bounds_of_documents`."""
        first = int(np.searchsorted(self._bounds, start, side="right")) - 1
        last = int(np.searchsorted(self._bounds, stop, side="left"))
        return self._bounds[first : last + 1]
