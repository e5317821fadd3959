"""A corpus as the preparation reads and splits it, before anything is tokenized."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from longspan.data import reading
from longspan.data.recipe import DEFAULT_SHARD_BYTES
from longspan.data.shards import sides
from longspan.data.sources import list_source
from longspan.data.split import split_rule
from longspan.data.tokens import SplitName


@dataclass
class Document:
    """A text and its name."""

    name: str
    text: str


@dataclass
class Corpus:
    """Documents of both splits, in order, and the number of those without text."""

    train: list[Document] = field(default_factory=list)
    validation: list[Document] = field(default_factory=list)
    num_empty: int = 0
    num_portions: int = 0


def read_corpus(
    source: str,
    suffixes: tuple[str, ...],
    text_key: str,
    max_bytes: int | None,
    validation_fraction: float,
    seed: int,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Corpus:
    """List, split and read a source."""
    listed = list_source(source, suffixes, text_key, max_bytes, seed, shard_bytes)

    def documents() -> Iterator[reading.Document]:
        for item in listed.items:
            yield from reading.read_documents(item, text_key, listed.skips_undecodable)

    rule = split_rule(documents(), validation_fraction, seed, source)
    corpus = Corpus(num_portions=len(listed.portions))
    unfinished: dict[SplitName, str] = {}
    for document in documents():
        corpus.num_empty += document.num_bytes == 0
        for side, text, is_last in sides(document, rule) if document.num_bytes else ():
            unfinished[side] = unfinished.get(side, "") + text
            if is_last:
                getattr(corpus, side).append(Document(document.name, unfinished.pop(side)))
    assert not unfinished
    return corpus
