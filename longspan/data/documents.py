"""Documents: where text comes from, and which of it is held out for validation.

A *document* is a file, or a line of a ``.jsonl`` file. Everything here is a function of the files' names and contents
and of the seed: the order in which a file system lists its entries has no effect.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from longspan.errors import DataError

STANDARD_LIBRARY = "python-stdlib"
# Tests repeat themselves and hold files that are deliberately not UTF-8; `encodings` and `pydoc_data` are tables.
_SKIPPED_FOLDERS = {
    *("site-packages", "dist-packages", "__pycache__"),
    *("test", "tests", "idle_test"),
    *("encodings", "pydoc_data"),
}


@dataclass(frozen=True)
class Document:
    """A text and the name that says where it came from."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents split into those to train on and those held out."""

    train: tuple[Document, ...]
    validation: tuple[Document, ...]


def read_corpus(
    source: str, suffixes: tuple[str, ...], text_key: str, max_bytes: int, validation_fraction: float, seed: int
) -> Corpus:
    """Read documents and split them by name.

    Args:
        source: ``"python-stdlib"`` (the Python sources of this interpreter's standard library), a folder, or a file.
        suffixes: the endings of the files to read in a folder, such as ``(".txt", ".jsonl")``.
        text_key: the key of the text in a line of a ``.jsonl`` file.
        max_bytes: stop after about this many bytes of text. The files are a random choice, the same for the same seed.
        validation_fraction: share of the documents to hold out; of a single document, its last part.
        seed: decides which documents are held out, and which are read under `max_bytes`.

    Raises:
        DataError: if there is no such source or no text in it, or a file cannot be read, is not UTF-8 or not JSON lines.
    """
    if source == STANDARD_LIBRARY:
        root = Path(sysconfig.get_path("stdlib"))
        paths = [p for p in root.rglob("*.py") if not _SKIPPED_FOLDERS & set(p.relative_to(root).parts)]
    else:
        root, paths = _listed_files(Path(source), suffixes)
    documents = []
    num_bytes = 0
    for path in sorted(paths, key=lambda p: _hash(seed, "order", p.relative_to(root).as_posix())):
        for document in _read_documents(path, path.relative_to(root).as_posix(), text_key, source == STANDARD_LIBRARY):
            if num_bytes >= max_bytes:
                break
            documents.append(document)
            num_bytes += len(document.text.encode())
    if num_bytes == 0:
        raise DataError(f"data.source {source!r} holds no text: its {len(paths)} files are empty. Give another source")
    return _split(documents, validation_fraction, seed)


def _listed_files(source: Path, suffixes: tuple[str, ...]) -> tuple[Path, list[Path]]:
    try:
        return _files_of(source, suffixes)
    except OSError as error:
        raise DataError(
            f"data.source {str(source)!r} cannot be read: {error}. Give access, or another source"
        ) from error


def _files_of(source: Path, suffixes: tuple[str, ...]) -> tuple[Path, list[Path]]:
    if source.is_file():
        return source.parent, [source]
    if not source.is_dir():
        raise DataError(
            f"data.source {str(source)!r} does not exist. Give a folder, a .txt or .jsonl file, or {STANDARD_LIBRARY!r}"
        )
    paths = [p for p in source.rglob("*") if p.suffix in suffixes and p.is_file()]
    if not paths:
        raise DataError(
            f"data.source {str(source)!r} has no file that ends in {', '.join(suffixes)}. "
            "Give another folder, or its endings as data.suffixes"
        )
    return source, paths


def _read_documents(path: Path, name: str, text_key: str, skip_undecodable: bool) -> Iterator[Document]:
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}. Give access to it, or move it away") from error
    except UnicodeDecodeError as error:
        if skip_undecodable:
            return
        raise DataError(
            f"{path} is not UTF-8: byte {error.object[error.start]:#04x} at offset {error.start}. Convert it, or "
            "move it away"
        ) from error
    if path.suffix != ".jsonl":
        if text:
            yield Document(name, text)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            text_of_line = _text_of_line(line, f"{path}, line {number},", text_key)
            if text_of_line:
                yield Document(f"{name}:{number}", text_of_line)


def _text_of_line(line: str, where: str, text_key: str) -> str:
    """The text in a line of a ``.jsonl`` file."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {error}. Each line must be one JSON object") from error
    if not isinstance(entry, dict) or text_key not in entry:
        found = ", ".join(map(repr, entry)) if isinstance(entry, dict) else type(entry).__name__
        raise DataError(
            f"{where} has no text under the key {text_key!r}; it has {found or 'no key'}. Set data.text_key"
        )
    text = entry[text_key]
    if not isinstance(text, str):
        raise DataError(
            f"{where} has no text under the key {text_key!r}, but {_json_type(text)}; it must be a string. Remove the line, or "
            "name the key of the text as data.text_key"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} has half a surrogate pair, \\u{ord(text[error.start]):04x}, at character {error.start} of its text: "
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


def _split(documents: list[Document], validation_fraction: float, seed: int) -> Corpus:
    """Hold out documents by a hash of their names, so that adding a document moves no other one to the other side."""
    if len(documents) == 1:
        return _split_one(documents[0], validation_fraction)
    ranked = sorted(documents, key=lambda d: _hash(seed, "split", d.name))
    limit = validation_fraction * 2.0**64
    num_validation = sum(_hash(seed, "split", d.name) < limit for d in ranked)
    num_validation = min(max(num_validation, 1), len(documents) - 1)
    held_out = {d.name for d in ranked[:num_validation]}
    by_name = sorted(documents, key=lambda d: d.name)
    return Corpus(
        train=tuple(d for d in by_name if d.name not in held_out),
        validation=tuple(d for d in by_name if d.name in held_out),
    )


def _split_one(document: Document, validation_fraction: float) -> Corpus:
    cut = int(len(document.text) * (1.0 - validation_fraction))
    cut = min(max(cut, 1), len(document.text) - 1)
    parts = Document(document.name, document.text[:cut]), Document(document.name, document.text[cut:])
    if not all(part.text for part in parts):
        raise DataError(f"{document.name!r} is too short to be split into training and validation text. Give more text")
    return Corpus(train=parts[:1], validation=parts[1:])


def _hash(seed: int, purpose: str, name: str) -> int:
    # The names of files need not be UTF-8.
    key = f"{seed}:{purpose}:{name}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.sha256(key).digest()[:8])
