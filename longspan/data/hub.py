"""Hugging Face data sets, streamed: ``hf:NAME?config=...&split=train&revision=...``, or a folder in place of the name.

The folder may hold files that `datasets.load_dataset` knows, or what `Dataset.save_to_disk` wrote. No code of a data set is run:
the `datasets` package has none any more.

A preparation takes all of its parts from the version that it found as it began: the commit of a data set of the hub, whatever is
pushed there meanwhile; the names, sizes and times of a folder's files.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from longspan.data.files import canonical, digest
from longspan.errors import DataError

PREFIX = "hf:"
_OPTIONS = ("config", "split", "revision")


def find_parts(address: str) -> tuple[int, str]:
    """Of how many parts, that can be read each by itself, a data set consists now, and its version, by which to read them.

    Raises:
        DataError: if there is no such data set, or the `datasets` package is not installed.
    """
    rows, version = _open(address)
    return int(rows.num_shards), version


def open_rows(address: str, text_key: str, part: int, of_parts: int, version: str) -> Iterator[str]:
    """The texts of a part of a data set; an empty one where there is none in a row.

    of_parts, version: as `find_parts` said.

    Raises:
        DataError: as `find_parts`; if it has no column of that name, or is of another version; if a row holds no text, or
        reading fails.
    """
    rows, found = _open(address, version)
    if (rows.num_shards, found) != (of_parts, version):
        raise DataError(
            f"{address} has changed since the preparation began: it has {rows.num_shards} parts and the version {found}, and had "
            f"{of_parts} and {version}. Run the same command again once it stays as it is"
        )
    names = rows.column_names
    if names is not None:
        _check_column(address, names, text_key)
        rows = rows.select_columns([text_key])
    number = -1
    try:
        for number, row in enumerate(rows.shard(num_shards=of_parts, index=part)):
            _check_column(address, list(row), text_key)
            text = row[text_key]
            if text is not None and not isinstance(text, str):
                raise DataError(
                    f"{address}: row {number} of part {part} has {type(text).__name__} in the column {text_key!r}; it must "
                    "be a string. "
                    "Name another column as data.text_key"
                )
            yield text or ""
    except DataError:
        raise
    except Exception as error:  # the package passes on what its many readers raise
        raise DataError(
            f"{address} could not be read behind row {number} of part {part}: {type(error).__name__}: {error}. Run the same "
            "command "
            "again to go on with what is done, or repair the data set"
        ) from error


def parse_address(address: str) -> tuple[str, dict[str, str]]:
    """Name, and options, of ``hf:NAME?config=...&split=...``.

    Raises:
        DataError: for an option that does not exist.
    """
    name, _, query = address.removeprefix(PREFIX).partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    unknown = [option for option in options if option not in _OPTIONS]
    if unknown or not name:
        what = f"the option {unknown[0]!r}, which is not one of {', '.join(_OPTIONS)}" if unknown else "no name"
        raise DataError(f"{address!r} has {what}. Write it as hf:NAME?config=...&split=train")
    return name, options


def is_inside(folder: Path, source: str) -> bool:
    """Whether a folder lies in the folder that a source names as a data set, which would then be read as a part of it."""
    if not source.startswith(PREFIX):
        return False
    root = Path(parse_address(source)[0])
    return root.is_dir() and folder.resolve().is_relative_to(root.resolve())


def _check_column(address: str, names: list[str], text_key: str) -> None:
    if text_key not in names:
        raise DataError(
            f"{address} has no column {text_key!r} for the text; it has {', '.join(map(repr, names))}. Set data.text_key"
        )


def _open(address: str, version: str | None = None) -> tuple[Any, str]:
    """The rows of a data set, as an iterable one, and its version; of the hub those of the version that is asked for."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{address} needs the package datasets, which is not installed. Install it with pip install 'longspan[data]'"
        ) from error
    name, options = parse_address(address)
    config, split, folder = options.get("config"), options.get("split", "train"), Path(name)
    try:
        if not folder.is_dir():
            if version is not None:
                return _rows_of_commit(name, config, split, version)
            return _rows_of_hub(name, config, split, options.get("revision"))
        found = _version_of(folder)
        if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
            saved = datasets.load_from_disk(name)
            if isinstance(saved, datasets.DatasetDict):
                if split not in saved:
                    raise ValueError(f"it has the splits {', '.join(saved)}, and no {split}")
                saved = saved[split]
            return saved.to_iterable_dataset(num_shards=max(1, len(saved.cache_files))), found
        return datasets.load_dataset(name, config, split=split, streaming=True), found
    except Exception as error:  # as above
        raise DataError(
            f"{address} could not be opened: {type(error).__name__}: {error}. Check the name, config=... and split=..., and "
            "the network"
        ) from error


def _rows_of_hub(name: str, config: str | None, split: str, revision: str | None) -> tuple[Any, str]:
    """The rows of a data set of the hub at a revision, and the commit that this is."""
    import datasets

    builder = datasets.load_dataset_builder(name, config, revision=revision)
    return builder.as_streaming_dataset(split=split), str(builder.hash)


# What is at a commit stays there: a process asks the hub once, and not for each part.
_rows_of_commit = lru_cache(maxsize=8)(_rows_of_hub)


def _version_of(folder: Path) -> str:
    """A checksum of the names, sizes and times of a folder's files."""
    found = [(path, path.stat()) for path in sorted(folder.rglob("*")) if path.is_file()]
    return digest(canonical([[str(path), status.st_size, status.st_mtime_ns] for path, status in found]))
