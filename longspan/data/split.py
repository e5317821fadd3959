"""Which documents are held out: by a hash of their names, so that a new document moves no other to the other side."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from longspan.data.reading import Document
from longspan.data.tokens import SplitName
from longspan.errors import DataError


@dataclass(frozen=True)
class SplitRule:
    """The side of each document of a source.

    fraction: share of the documents that is held out. forced: name and side of a document that goes against its hash, so that each
    side of a small source has one. cut: the only document is cut, and its end held out.
    """

    fraction: float
    seed: int
    forced: tuple[str, SplitName] | None = None
    cut: bool = False

    def side(self, name: str) -> SplitName:
        """Where the document of this name goes."""
        if self.forced is not None and self.forced[0] == name:
            return self.forced[1]
        return "validation" if hash_of(self.seed, "split", name) < self.fraction * 2.0**64 else "train"


def split_rule(documents: Iterable[Document], fraction: float, seed: int, source: str) -> SplitRule:
    """The rule for a source: read until both sides have a document, which few documents decide unless the source is small.

    Raises:
        DataError: if the source has no text, or one document of a single character.
    """
    rule = SplitRule(fraction, seed)
    names: list[str] = []
    last: Document | None = None
    for document in documents:
        if document.num_bytes:
            last = document
            names.append(document.name)
            if len({rule.side(name) for name in (names[0], document.name)}) == 2:
                return rule
    if last is None:
        raise DataError(f"data.source {source!r} holds no text: its documents are empty. Give another source")
    if len(names) == 1:
        if last.num_bytes <= 4 and len("".join(last.pieces)) < 2:
            raise DataError(f"{last.name!r} is too short to be split into training and validation text. Give more text")
        return SplitRule(fraction, seed, cut=True)
    by_hash = sorted(names, key=lambda name: hash_of(seed, "split", name))
    side: SplitName = "validation" if rule.side(names[0]) == "train" else "train"
    return SplitRule(fraction, seed, forced=(by_hash[0] if side == "validation" else by_hash[-1], side))


def hash_of(seed: int, purpose: str, name: str) -> int:
    """64 bits that look random, the same for the same arguments."""
    # The names of files need not be UTF-8.
    key = f"{seed}:{purpose}:{name}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.sha256(key).digest()[:8])
