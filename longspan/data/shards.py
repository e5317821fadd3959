"""One shard: documents read, split, tokenized and written, by whichever process; the same bytes whoever made it, and when."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from longspan.data.files import canonical, digest, read_checked, with_checksum, write_whole
from longspan.data.reading import Document, Item, read_documents
from longspan.data.split import SplitRule
from longspan.data.tokenizer import Tokenizer
from longspan.data.tokens import (
    SPLITS,
    TOKENS_FORMAT,
    SplitName,
    SplitWriter,
    TokenShard,
    TokenType,
    split_info_from_json,
)
from longspan.errors import DataError

_BATCH_CHARACTERS = 2**20
"""Text that is tokenized at once."""


@dataclass(frozen=True)
class ShardTask:
    """What decides the contents of a shard, apart from the text; all of it travels to the process that makes it."""

    folder: str
    source: int
    number: int
    items: tuple[Item, ...]
    rule: SplitRule
    text_key: str
    skip_undecodable: bool
    tokenizer_sha256: str
    vocab_size: int

    @property
    def description(self) -> Path:
        """The file that says what the shard holds, written last."""
        return Path(self.folder) / f"shard-{self.source:02d}-{self.number:05d}.json"

    def stem(self, split: SplitName) -> Path:
        """The files of a split, without their suffix."""
        return Path(self.folder) / f"{split}-{self.source:02d}-{self.number:05d}"

    @property
    def input_sha256(self) -> str:
        """A checksum of all that the shard is made from, files as they were listed."""
        return digest(canonical({"format": TOKENS_FORMAT} | {k: v for k, v in asdict(self).items() if k != "folder"}))


@dataclass(frozen=True)
class Shard:
    """A shard on the disk."""

    description_sha256: str
    num_empty: int
    splits: dict[SplitName, TokenShard]


def make_shard(task: ShardTask, tokenizer: Tokenizer, done: Callable[[int], None] = lambda num_bytes: None) -> None:
    """Write the files of a shard; its description appears when all of the others are on the disk.

    done: told the bytes of text that have been tokenized.

    Raises:
        DataError: if an item cannot be read. OSError: if the shard cannot be written.
    """
    token_type = TokenType(task.vocab_size)
    with contextlib.ExitStack() as files:
        writers = {split: SplitWriter(task.stem(split), token_type, files) for split in SPLITS}
        num_empty = 0
        batch: list[tuple[SplitName, str, bool]] = []
        held = 0

        def flush() -> None:
            nonlocal held
            encoded = tokenizer.encode_arrays([text for _, text, _ in batch])
            num_bytes = 0
            for (split, text, ends), tokens in zip(batch, encoded, strict=True):
                if ends:
                    tokens = np.append(tokens, tokenizer.end_of_document)
                size = len(text.encode())
                writers[split].append(tokens, size, ends)
                num_bytes += size
            batch.clear()
            done(num_bytes)
            held = 0

        for item in task.items:
            for document in read_documents(item, task.text_key, task.skip_undecodable):
                if document.num_bytes == 0:
                    num_empty += 1
                    continue
                for part in sides(document, task.rule):
                    batch.append(part)
                    held += len(part[1])
                    if held >= _BATCH_CHARACTERS:
                        flush()
        flush()
        infos = {split: writer.finish() for split, writer in writers.items()}
    body = {
        "format": TOKENS_FORMAT,
        "input_sha256": task.input_sha256,
        "tokenizer_sha256": task.tokenizer_sha256,
        "vocab_size": task.vocab_size,
        "num_empty": num_empty,
        "splits": {split: asdict(info) for split, info in infos.items() if info is not None},
    }
    write_whole(task.description, with_checksum(body))


def sides(document: Document, rule: SplitRule) -> Iterator[tuple[SplitName, str, bool]]:
    """The pieces of a document, each with its side, and whether it is the last of its document on that side."""
    if not rule.cut:
        side = rule.side(document.name)
        for text, is_last in _with_last(document.pieces):
            yield side, text, is_last
        return
    # The only document: its last part is held out.
    goal = document.num_bytes * (1.0 - rule.fraction)
    behind, side = 0, "train"
    for text, is_last in _with_last(document.pieces):
        size = len(text.encode())
        if side == "train" and (is_last or behind + size > goal):
            cut = min(max(int(len(text) * (goal - behind) / size), 1), len(text) - 1)
            yield "train", text[:cut], True
            side, text = "validation", text[cut:]
        yield side, text, is_last
        behind += size


def _with_last(pieces: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Each piece, and whether no other follows."""
    iterator = iter(pieces)
    text = next(iterator, None)
    while text is not None:
        following = next(iterator, None)
        yield text, following is None
        text = following


def open_shard(description: Path, splits: dict[SplitName, Path], remedy: str) -> tuple[dict[str, Any], Shard]:
    """The description of a shard, and its files, of which nothing is read.

    Raises:
        DataError: if the description is missing or damaged.
    """
    body = read_checked(description, remedy)
    if body.get("format") != TOKENS_FORMAT:
        raise DataError(
            f"{description} is of format {body.get('format')!r}; this version reads {TOKENS_FORMAT!r}. {remedy}"
        )
    try:
        token_type = TokenType(body["vocab_size"])
        found = {
            split: TokenShard(splits[split], split_info_from_json(body["splits"][split]), token_type)
            for split in SPLITS
            if split in body["splits"]
        }
        shard = Shard(digest(with_checksum(body)), body["num_empty"], found)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{description} does not describe a shard: {type(error).__name__}: {error}. {remedy}"
        ) from error
    return body, shard


def finished_shard(task: ShardTask) -> Shard | None:
    """The shard of an earlier process, if its description says that it was made of just this; its tokens are not verified yet."""
    if not task.description.exists():
        return None
    try:
        body, shard = open_shard(task.description, {split: task.stem(split) for split in SPLITS}, "")
    except DataError:
        return None
    return shard if body["input_sha256"] == task.input_sha256 else None
