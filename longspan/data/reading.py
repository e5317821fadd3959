"""Reading documents: a text file is one, a line of a ``.jsonl`` file, a row of a Parquet file or of a Hugging Face data set.

What is read is an `Item`: a part of a source that can be read by itself, so that several processes can share the work and a process
that was killed can go on. A text is handed on in *pieces* of at most `PIECE_BYTES`, cut at line ends: nothing holds all of a long
one, nor all of a file.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from longspan.data.hub import open_rows
from longspan.errors import DataError

PIECE_BYTES = 2**20

Kind = Literal["text", "jsonl", "parquet", "huggingface"]
KIND_OF_SUFFIX: dict[str, Kind] = {".jsonl": "jsonl", ".parquet": "parquet"}
"""Files of other suffixes are text."""


@dataclass(frozen=True)
class Item:
    """A part of a source.

    path: of the file; of a Hugging Face data set, its address. name: of the file inside its source, by which its documents are
    named. size, changed: of the file, in bytes and nanoseconds. start, stop: which bytes of a ``.jsonl`` file (lines that begin in
    them), which row groups of a Parquet file; which of how many parts of a Hugging Face data set. max_text_bytes: stop after
    about so much text. version: of a Hugging Face data set, as it was listed.
    """

    kind: Kind
    path: str
    name: str
    size: int = 0
    changed: int = 0
    start: int = 0
    stop: int = 0
    max_text_bytes: int | None = None
    version: str = ""


@dataclass(frozen=True)
class Document:
    """A text in pieces, and the name that says where it came from; num_bytes: of the whole text, 0 of an empty one."""

    name: str
    num_bytes: int
    pieces: Iterable[str]


def read_documents(item: Item, text_key: str, skip_undecodable: bool = False) -> Iterator[Document]:
    """The documents of an item, in order, empty ones included. The pieces of one must be taken before the next one is.

    Args:
        text_key: the key of the text in a line of a ``.jsonl`` file, or the column that holds it.
        skip_undecodable: leave text files out that are not UTF-8.

    Raises:
        DataError: if the item cannot be read, has changed since it was listed, is not UTF-8, or has no text under that key; the
        file and
            the place in it are named.
    """
    if item.kind == "huggingface":
        documents = _read_rows(item, text_key)
    else:
        _check_unchanged(item)
        if item.kind == "text":
            documents = _read_text(item, skip_undecodable)
        else:
            documents = _read_lines(item, text_key) if item.kind == "jsonl" else _read_parquet(item, text_key)
    if item.max_text_bytes is None:
        yield from documents
        return
    num_bytes = 0
    for document in documents:
        if num_bytes >= item.max_text_bytes:
            return
        num_bytes += document.num_bytes
        yield document


def _check_unchanged(item: Item) -> None:
    try:
        found = os.stat(item.path)
    except OSError as error:
        raise _unreadable(item.path, error) from error
    if (found.st_size, found.st_mtime_ns) != (item.size, item.changed):
        raise DataError(
            f"{item.path} was changed while it was prepared: it had {item.size} bytes and has {found.st_size}, or was "
            "written anew. "
            "Run the same command again once it is whole"
        )


def _read_text(item: Item, skip_undecodable: bool) -> Iterator[Document]:
    try:
        with open(item.path, "rb") as file:
            first = file.read(PIECE_BYTES + 1)
            if len(first) > PIECE_BYTES:
                file.seek(0)
                yield Document(item.name, item.size, _pieces(file, item.path))
                return
        text = _decode(first, item.path, 0)
    except OSError as error:
        raise _unreadable(item.path, error) from error
    except DataError:
        if skip_undecodable:
            return
        raise
    yield Document(item.name, len(first), (text,))


def _pieces(file: BinaryIO, where: str) -> Iterator[str]:
    """The text of a file in pieces of at most `PIECE_BYTES`, each cut behind its last line end, or else between characters."""
    rest, offset = b"", 0
    while True:
        try:
            block = rest + file.read(PIECE_BYTES - len(rest))
        except OSError as error:
            raise _unreadable(where, error) from error
        if len(block) < PIECE_BYTES:
            if block:
                yield _decode(block, where, offset)
            return
        cut = block.rfind(b"\n") + 1 or _end_of_characters(block)
        yield _decode(block[:cut], where, offset)
        offset += cut
        rest = block[cut:]


def _end_of_characters(block: bytes) -> int:
    """Length of `block` without the first bytes of a character of UTF-8 that is cut at its end."""
    for back in range(1, 5):
        byte = block[-back]
        if byte & 0xC0 != 0x80:
            length = 1 if byte < 0x80 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(block) - back if length > back else len(block)
    return len(block)


def _decode(content: bytes, where: str, offset: int) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where} is not UTF-8: byte {content[error.start]:#04x} at offset {offset + error.start}. Convert it, or "
            "move it away"
        ) from error


def _document_of(name: str, text: str, where: str) -> Document:
    content = text.encode()
    if len(content) <= PIECE_BYTES:
        return Document(name, len(content), (text,))
    return Document(name, len(content), _pieces(io.BytesIO(content), where))


def _read_lines(item: Item, text_key: str) -> Iterator[Document]:
    try:
        with open(item.path, "rb") as file:
            if item.start:
                # What stands before is the end of a line that began in the part before.
                file.seek(item.start - 1)
                file.readline()
            while (offset := file.tell()) < item.stop:
                content = file.readline()
                if not content.strip():
                    continue
                try:
                    line = _decode(content, item.path, offset)
                    text = text_of_line(line, text_key)
                except ValueError as error:
                    if isinstance(error, DataError):
                        raise
                    number = _line_number(item.path, offset)
                    raise DataError(f"{item.path}, line {number}, {error}") from error
                yield _document_of(f"{item.name}:{offset}", text, item.path)
    except OSError as error:
        raise _unreadable(item.path, error) from error


def _line_number(path: str, offset: int) -> int:
    """Which line begins at `offset`, counted from 1."""
    number = 1
    with open(path, "rb") as file:
        while offset > 0 and (block := file.read(min(offset, PIECE_BYTES))):
            number += block.count(b"\n")
            offset -= len(block)
    return number


def text_of_line(line: str, text_key: str) -> str:
    """The text in a line of a ``.jsonl`` file; raises ValueError, whose message goes on from the name of the place."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON: {error}. Each line must be one JSON object") from error
    if not isinstance(entry, dict) or text_key not in entry:
        found = ", ".join(map(repr, entry)) if isinstance(entry, dict) else type(entry).__name__
        raise ValueError(f"has no text under the key {text_key!r}; it has {found or 'no key'}. Set data.text_key")
    text = entry[text_key]
    if not isinstance(text, str):
        raise ValueError(
            f"has no text under the key {text_key!r}, but {_json_type(text)}; it must be a string. Remove the line, or name "
            "the key of the text as data.text_key"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"has half a surrogate pair, \\u{ord(text[error.start]):04x}, at character {error.start} of its text: "
            "such text cannot be written as UTF-8. Repair the line, or remove it"
        ) from error
    return text


def _json_type(value: object) -> str:
    """What JSON calls the type of a value, with an article."""
    if value is None:
        return "null"
    kinds = {
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "an array",
        dict: "an object",
    }
    return kinds[type(value)]


def parquet_file(path: str) -> Any:
    """A Parquet file, of which nothing but its description is read.

    Raises:
        DataError: if it is none, cannot be read, or pyarrow is not installed.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(
            f"{path} is a Parquet file, and the package pyarrow, which reads them, is not installed. Install it with "
            "pip install 'longspan[data]'"
        ) from error
    try:
        return parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} cannot be read as a Parquet file: {error}. Write it anew, or move it away") from error


def check_text_column(path: str, file: Any, text_key: str) -> None:
    """Raise DataError unless a Parquet file has a column of that name that holds strings."""
    import pyarrow

    schema = file.schema_arrow
    if text_key not in schema.names:
        raise DataError(
            f"{path} has no column {text_key!r} for the text; it has {', '.join(map(repr, schema.names))}. Set data.text_key"
        )
    kind = schema.field(text_key).type
    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise DataError(
            f"{path}: the column {text_key!r} holds {kind}; text is a column of strings. Name another one as data.text_key"
        )


def _read_parquet(item: Item, text_key: str) -> Iterator[Document]:
    import pyarrow

    file = parquet_file(item.path)
    check_text_column(item.path, file, text_key)
    row = sum(file.metadata.row_group(group).num_rows for group in range(item.start))
    try:
        batches = file.iter_batches(batch_size=256, row_groups=list(range(item.start, item.stop)), columns=[text_key])
        for batch in batches:
            for text in batch.column(0).to_pylist():
                yield _document_of(f"{item.name}:{row}", text or "", item.path)
                row += 1
    except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise DataError(
            f"{item.path} cannot be read near row {row}: {error}. Write it anew, or move it away"
        ) from error


def _read_rows(item: Item, text_key: str) -> Iterator[Document]:
    for row, text in enumerate(open_rows(item.path, text_key, item.start, item.stop, item.version)):
        yield _document_of(f"{item.name}:{item.start}:{row}", text, item.path)


def _unreadable(path: str | Path, error: OSError) -> DataError:
    return DataError(f"{path} cannot be read: {error}. Give access to it, or move it away")
