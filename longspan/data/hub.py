"""Hugging Face data sets, streamed: ``hf:NAME?config=...&split=train&revision=...``, or a folder in place of the name.

The folder may hold files that `datasets.load_dataset` knows, or what `Dataset.save_to_disk` wrote. No code of a data set is run:
the `datasets` package has none any more.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from longspan.errors import DataError

PREFIX = "hf:"
_OPTIONS = ("config", "split", "revision")


def num_parts(address: str) -> int:
    """Of how many parts, that can be read each by itself, a data set consists.

    Raises:
        DataError: if there is no such data set, or the `datasets` package is not installed.
    """
    return int(_open(address).num_shards)


def open_rows(address: str, text_key: str, part: int, of_parts: int) -> Iterator[str]:
    """The texts of a part of a data set; an empty one where there is none in a row.

    Raises:
        DataError: as `num_parts`; if it has no column of that name or another number of parts; if a row holds no text, or
        reading fails.
    """
    rows = _open(address)
    if rows.num_shards != of_parts:
        raise DataError(
            f"{address} consists of {rows.num_shards} parts, and of {of_parts} when the preparation began: the data set has "
            "changed. "
            "Give its revision (revision=...), and prepare into another folder"
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


def _open(address: str) -> Any:
    """The rows of a data set, as an iterable one."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{address} needs the package datasets, which is not installed. Install it with pip install 'longspan[data]'"
        ) from error
    name, options = parse_address(address)
    split = options.get("split", "train")
    folder = Path(name)
    try:
        if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
            saved = datasets.load_from_disk(name)
            if isinstance(saved, datasets.DatasetDict):
                if split not in saved:
                    raise ValueError(f"it has the splits {', '.join(saved)}, and no {split}")
                saved = saved[split]
            return saved.to_iterable_dataset(num_shards=max(1, len(saved.cache_files)))
        return datasets.load_dataset(
            name, options.get("config"), split=split, revision=options.get("revision"), streaming=True
        )
    except Exception as error:  # as above
        raise DataError(
            f"{address} could not be opened: {type(error).__name__}: {error}. Check the name, config=... and split=..., and "
            "the network"
        ) from error
