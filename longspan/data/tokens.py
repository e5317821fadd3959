"""Token files: a flat binary of token ids, and beside it a JSON that says what is in it.

``train.bin`` holds N little-endian uint16 or uint32 numbers and nothing else; ``train.json`` holds their dtype, number,
vocabulary, SHA-256 and the offsets of the documents. A file is verified as a whole before any of it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from longspan.errors import DataError

TOKEN_FILE_FORMAT = "longspan-tokens-1"
_DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


@dataclass(frozen=True)
class TokenFileInfo:
    """The sidecar of a token file."""

    format: str
    dtype: str
    num_tokens: int
    vocab_size: int
    num_text_bytes: int
    sha256: str
    tokenizer_sha256: str
    documents: tuple[int, ...]
    """Offset of each document's first token, and `num_tokens` at the end."""


@dataclass(frozen=True)
class TokenFile:
    """A verified token file: `tokens` is a read-only array ``[num_tokens]`` of unsigned integers, mapped from disk."""

    path: Path
    info: TokenFileInfo
    tokens: np.ndarray

    @property
    def num_tokens(self) -> int:
        return self.info.num_tokens

    @property
    def token_counts(self) -> np.ndarray:
        """How often each token of the vocabulary occurs, int64 ``[vocab_size]``."""
        return np.bincount(self.tokens, minlength=self.info.vocab_size)

    @cached_property
    def _bounds(self) -> np.ndarray:
        return np.array(self.info.documents, dtype=np.int64)

    def read(self, start: int, stop: int) -> np.ndarray:
        """A copy of the tokens ``[start, stop)``, int64."""
        return self.tokens[start:stop].astype(np.int64)

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Offsets at which a document starts, among ``[start, stop)``, int64."""
        first, last = np.searchsorted(self._bounds[:-1], [start, stop])
        return self._bounds[first:last]

    def bounds_of_documents(self, start: int, stop: int) -> np.ndarray:
        """Where each document that has a token in ``[start, stop)`` starts, and where the last of them ends, int64."""
        first = np.searchsorted(self._bounds, start, side="right") - 1
        last = np.searchsorted(self._bounds, stop, side="left")
        return self._bounds[first : last + 1]

    def num_longer_documents(self, length: int) -> int:
        """Number of documents of more than `length` tokens."""
        return int((np.diff(self._bounds) > length).sum())


def sidecar_path(path: Path) -> Path:
    """Where the description of the token file `path` is."""
    return path.with_suffix(".json")


def write_token_file(
    path: Path, documents: Sequence[Sequence[int]], vocab_size: int, num_text_bytes: int, tokenizer_sha256: str
) -> TokenFileInfo:
    """Write `documents` one after another; the file and its sidecar appear under their names when they are whole."""
    dtype = "uint16" if vocab_size <= 2**16 else "uint32"
    offsets = np.concatenate([[0], np.cumsum([len(document) for document in documents])])
    tokens = np.concatenate([np.asarray(document, dtype=_DTYPES[dtype]) for document in documents])
    info = TokenFileInfo(
        format=TOKEN_FILE_FORMAT,
        dtype=dtype,
        num_tokens=len(tokens),
        vocab_size=vocab_size,
        num_text_bytes=num_text_bytes,
        sha256=hashlib.sha256(tokens.tobytes()).hexdigest(),
        tokenizer_sha256=tokenizer_sha256,
        documents=tuple(offsets.tolist()),
    )
    write_whole(path, tokens.tobytes())
    write_whole(sidecar_path(path), json.dumps(asdict(info)).encode())
    return info


def open_token_file(path: Path) -> TokenFile:
    """Map a token file after checking all of it against its sidecar.

    Raises:
        DataError: for a missing file, an unknown dtype, a size that is no whole number of tokens, a token outside the
            vocabulary (its offset is named), or contents that changed since the file was written.
    """
    info = _read_info(sidecar_path(path))
    again = "Prepare the data again"
    if not path.is_file():
        raise DataError(f"{path} is missing, though {sidecar_path(path).name} describes it. {again}")
    dtype = _DTYPES[info.dtype]
    size = path.stat().st_size
    if size % dtype.itemsize:
        raise DataError(
            f"{path} has {size} bytes, which is no whole number of {info.dtype} tokens of {dtype.itemsize} bytes: "
            f"the file was cut off, or its dtype is another. {again}"
        )
    if size // dtype.itemsize != info.num_tokens:
        raise DataError(
            f"{path} holds {size // dtype.itemsize} tokens of {info.dtype}; {sidecar_path(path).name} says "
            f"{info.num_tokens}: the file was cut off, or its dtype is another. {again}"
        )
    try:
        tokens: np.ndarray = np.memmap(path, dtype=dtype, mode="r")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}. Give access to it, or prepare the data again") from error
    outside = np.flatnonzero(tokens >= info.vocab_size)
    if len(outside):
        offset = int(outside[0])
        raise DataError(
            f"{path}: token {int(tokens[offset])} at offset {offset} (byte {offset * dtype.itemsize}) is outside the "
            f"vocabulary of {info.vocab_size}: the file is damaged, or its dtype is not {info.dtype}. {again}"
        )
    if hashlib.sha256(tokens.data).hexdigest() != info.sha256:
        raise DataError(
            f"{path} is not what was prepared: its SHA-256 is not that of {sidecar_path(path).name}. {again}"
        )
    return TokenFile(path, info, tokens)


def _read_info(path: Path) -> TokenFileInfo:
    try:
        values: Any = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read: {error}. Prepare the data again") from error
    names = set(TokenFileInfo.__dataclass_fields__)
    if not isinstance(values, dict) or set(values) != names or values["format"] != TOKEN_FILE_FORMAT:
        raise DataError(f"{path} does not describe a token file of format {TOKEN_FILE_FORMAT}. Prepare the data again")
    dtype = values["dtype"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise DataError(f"{path}: dtype {dtype!r} is not one of {', '.join(_DTYPES)}. Prepare the data again")
    most = {"num_tokens": 2**63 - 1, "vocab_size": 2 ** (8 * _DTYPES[dtype].itemsize), "num_text_bytes": 2**63 - 1}
    for name, limit in most.items():
        if type(values[name]) is not int or not 1 <= values[name] <= limit:
            raise DataError(
                f"{path}: {name} is {values[name]!r}; it must be a whole number from 1 to {limit}. Prepare the data again"
            )
    documents = values["documents"]
    offsets = documents if isinstance(documents, list) and all(type(n) is int for n in documents) else []
    rising = all(before <= after for before, after in pairwise(offsets))
    if not offsets or offsets[0] != 0 or offsets[-1] != values["num_tokens"] or not rising:
        raise DataError(
            f"{path}: the documents' offsets do not rise from 0 to {values['num_tokens']}. Prepare the data again"
        )
    return TokenFileInfo(**(values | {"documents": tuple(documents)}))


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears under its name when it is whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
