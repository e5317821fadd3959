"""Where text comes from, and how the work on it is cut: a source is listed once, in an order that no file system decides."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from longspan.data.hub import PREFIX, find_parts
from longspan.data.reading import KIND_OF_SUFFIX, Item, check_text_column, parquet_file
from longspan.data.split import hash_of
from longspan.errors import DataError

STANDARD_LIBRARY = "python-stdlib"
# Tests repeat themselves and hold files that are deliberately not UTF-8; `encodings` and `pydoc_data` are tables.
_SKIPPED_FOLDERS = {
    *("site-packages", "dist-packages", "__pycache__"),
    *("test", "tests", "idle_test"),
    *("encodings", "pydoc_data"),
}


@dataclass(frozen=True)
class Portion:
    """Items that one shard is made of, and about how many bytes they are; 0 where nobody knows."""

    items: tuple[Item, ...]
    num_bytes: int


@dataclass(frozen=True)
class ListedSource:
    """A source, cut into portions by the names of its files."""

    name: str
    portions: tuple[Portion, ...]

    @property
    def skips_undecodable(self) -> bool:
        """Whether files that are not UTF-8 are left out."""
        return self.name == STANDARD_LIBRARY

    @property
    def items(self) -> Iterator[Item]:
        return (item for portion in self.portions for item in portion.items)


def list_source(
    source: str, suffixes: tuple[str, ...], text_key: str, max_bytes: int | None, seed: int, shard_bytes: int
) -> ListedSource:
    """List a source.

    Args:
        source: ``"python-stdlib"`` (the Python sources of this interpreter's standard library), a folder, a file, or a Hugging Face
            data set as ``hf:NAME?config=...&split=...``.
        suffixes: the endings of the files to read in a folder, such as ``(".txt", ".jsonl")``.
        text_key: the column of the text in Parquet files.
        max_bytes: take files up to about this many bytes; None takes all. They are a random choice, the same for the same seed. A
            ``.jsonl`` or Parquet file that goes beyond is read up to there, and every part of a Hugging Face data set up to its
            share.
        seed: decides which files are taken under `max_bytes`.
        shard_bytes: about how much text a portion holds; a text file is never divided.

    Raises:
        DataError: if there is no such source, or it cannot be read.
    """
    if source.startswith(PREFIX):
        parts, version = find_parts(source)
        most = None if max_bytes is None else -(-max_bytes // parts)
        items = [
            Item("huggingface", source, source, start=part, stop=parts, max_text_bytes=most, version=version)
            for part in range(parts)
        ]
        return ListedSource(source, tuple(Portion((item,), 0) for item in items))
    root, paths = _files(source, suffixes)
    named = {path.relative_to(root).as_posix(): path for path in paths}
    try:
        sized = [(name, named[name], named[name].stat()) for name in named]
    except OSError as error:
        raise _unreadable(source, error) from error
    if max_bytes is not None:
        sized.sort(key=lambda each: hash_of(seed, "order", each[0]))
    chosen: list[list[tuple[Item, int]]] = []
    remaining = max_bytes
    for name, path, status in sized:
        if remaining is not None and remaining <= 0:
            break
        item = Item(KIND_OF_SUFFIX.get(path.suffix, "text"), str(path), name, status.st_size, status.st_mtime_ns)
        chosen.append(_parts_of(item, remaining, text_key, shard_bytes))
        remaining = None if remaining is None else remaining - status.st_size
    chosen.sort(key=lambda parts: parts[0][0].name)
    return ListedSource(source, tuple(_portions(chosen, shard_bytes)))


def _parts_of(item: Item, most: int | None, text_key: str, shard_bytes: int) -> list[tuple[Item, int]]:
    """A file as items of at most about `shard_bytes`, with their bytes; `most` bytes of it, if it can be divided."""
    if item.kind == "jsonl":
        stop = item.size if most is None else min(item.size, most)
        starts = range(0, max(1, stop), shard_bytes)
        ranges = [(start, min(stop, start + shard_bytes)) for start in starts]
        return [(_with_range(item, start, end), end - start) for start, end in ranges]
    if item.kind == "parquet":
        file = parquet_file(item.path)
        check_text_column(item.path, file, text_key)
        sizes = [_text_bytes(file.metadata.row_group(group), text_key) for group in range(file.metadata.num_row_groups)]
        if most is not None and sum(sizes) > most:
            whole = Item(item.kind, item.path, item.name, item.size, item.changed, 0, len(sizes), most)
            return [(whole, most)]
        parts, first, held = [], 0, 0
        for group, size in enumerate(sizes):
            held += size
            if held >= shard_bytes or group + 1 == len(sizes):
                parts.append((_with_range(item, first, group + 1), held))
                first, held = group + 1, 0
        return parts or [(item, 0)]
    return [(item, item.size)]


def _text_bytes(group: object, text_key: str) -> int:
    """Bytes of the text column of a row group of a Parquet file, uncompressed."""
    columns = [group.column(index) for index in range(group.num_columns)]  # type: ignore[attr-defined]
    return sum(column.total_uncompressed_size for column in columns if column.path_in_schema == text_key)


def _with_range(item: Item, start: int, stop: int) -> Item:
    return Item(item.kind, item.path, item.name, item.size, item.changed, start, stop)


def _portions(files: list[list[tuple[Item, int]]], shard_bytes: int) -> Iterator[Portion]:
    items: list[Item] = []
    held = 0
    for item, num_bytes in (part for parts in files for part in parts):
        if items and held + num_bytes > shard_bytes:
            yield Portion(tuple(items), held)
            items, held = [], 0
        items.append(item)
        held += num_bytes
    if items:
        yield Portion(tuple(items), held)


def _files(source: str, suffixes: tuple[str, ...]) -> tuple[Path, list[Path]]:
    if source == STANDARD_LIBRARY:
        root = Path(sysconfig.get_path("stdlib"))
        return root, [p for p in root.rglob("*.py") if not _SKIPPED_FOLDERS & set(p.relative_to(root).parts)]
    try:
        return _files_of(Path(source), suffixes)
    except OSError as error:
        raise _unreadable(source, error) from error


def _files_of(source: Path, suffixes: tuple[str, ...]) -> tuple[Path, list[Path]]:
    if source.is_file():
        return source.parent, [source]
    if not source.is_dir():
        raise DataError(
            f"data.source {str(source)!r} does not exist. Give a folder, a text, .jsonl or .parquet file, hf: and the name of a "
            f"Hugging Face data set, or {STANDARD_LIBRARY!r}"
        )
    paths = [p for p in source.rglob("*") if p.suffix in suffixes and p.is_file()]
    if not paths:
        raise DataError(
            f"data.source {str(source)!r} has no file that ends in {', '.join(suffixes)}. "
            "Give another folder, or its endings as data.suffixes"
        )
    return source, paths


def _unreadable(source: str, error: OSError) -> DataError:
    return DataError(f"data.source {source!r} cannot be read: {error}. Give access, or another source")
