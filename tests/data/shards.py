"""Shards of given tokens: what the tests of data share."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from longspan.data.recipe import Recipe
from longspan.data.tokens import SplitWriter, TokenShard, TokenStream, TokenType


def write_shard(stem: Path, documents: Sequence[Sequence[int]], vocab_size: int) -> TokenShard:
    """A shard of these documents, its files beside `stem`."""
    token_type = TokenType(vocab_size)
    with contextlib.ExitStack() as files:
        writer = SplitWriter(stem, token_type, files)
        for document in documents:
            writer.append(np.array(document), len(document), True)
        info = writer.finish()
    assert info is not None
    return TokenShard(stem, info, token_type)


def write_stream(
    folder: Path, documents: Sequence[Sequence[int]], vocab_size: int, per_shard: int | None = None
) -> TokenStream:
    """A stream of these documents, in shards of `per_shard` documents; None is one."""
    size = per_shard or len(documents)
    shards = [
        write_shard(folder / f"train-00-{first:05d}", documents[first : first + size], vocab_size)
        for first in range(0, len(documents), size)
    ]
    return TokenStream("the training text", shards)


def recipe(*source: Path | str, **changes: object) -> Recipe:
    """A recipe for bytes of all of the sources."""
    values = {
        "source": tuple(map(str, source)),
        "suffixes": (".txt", ".jsonl", ".parquet"),
        "text_key": "text",
        "max_bytes": None,
        "validation_fraction": 0.3,
        "tokenizer": "bytes",
        "vocab_size": 280,
        "seed": 0,
    }
    return Recipe(**(values | changes))  # type: ignore[arg-type]
