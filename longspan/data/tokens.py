"""Token files: the shards of a prepared folder, and the stream of tokens that they make together.

A shard is what one piece of work made of its documents. ``shard-00-00003.json`` says of source 0's shard 3, for each split:

    train-00-00003.tokens    token ids, little-endian uint16 or uint32, and nothing else
    train-00-00003.index     uint64: where each document starts, and the number of tokens at the end
    train-00-00003.counts    uint64: how often each token of the vocabulary occurs

with their numbers and SHA-256, those of the tokens by blocks of `BLOCK_BYTES`: a block is verified by itself, before it is first
used or all of them at the start, in threads. No file is ever read as a whole.
"""

from __future__ import annotations

import contextlib
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from longspan.data.files import canonical, digest, write_whole, written_whole
from longspan.errors import DataError

TOKENS_FORMAT = "longspan-tokens-2"
BLOCK_BYTES = 2**22
_DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_INDEX = np.dtype("<u8")
_AGAIN = "Prepare the data again"

SplitName = Literal["train", "validation"]
SPLITS: tuple[SplitName, ...] = ("train", "validation")


@dataclass(frozen=True)
class SplitInfo:
    """What a shard holds of one split; `tokens_sha256` is of each block."""

    num_tokens: int
    num_documents: int
    num_text_bytes: int
    tokens_sha256: tuple[str, ...]
    index_sha256: str
    counts_sha256: str


@dataclass(frozen=True)
class TokenType:
    """How token ids are stored: as the smallest of the dtypes that holds the vocabulary."""

    vocab_size: int

    @property
    def name(self) -> str:
        return "uint16" if self.vocab_size <= 2**16 else "uint32"

    @property
    def dtype(self) -> np.dtype[Any]:
        return _DTYPES[self.name]


def split_info_from_json(values: dict[str, Any]) -> SplitInfo:
    """What `asdict` made of a `SplitInfo`, read back from a file whose checksum was right."""
    return SplitInfo(**(values | {"tokens_sha256": tuple(values["tokens_sha256"])}))


class SplitWriter:
    """Writes the files of one split of a shard, ``{stem}.tokens`` and so on; of the tokens no more than a block is held in memory.

    files: where the file of tokens is entered: it appears under its name as this is left.
    """

    def __init__(self, stem: Path, token_type: TokenType, files: contextlib.ExitStack) -> None:
        self._stem, self._type, self._files = stem, token_type, files
        self._tokens: BinaryIO | None = None
        self._buffer = bytearray()
        self._digests: list[str] = []
        self._num_tokens = 0
        self._num_text_bytes = 0
        self._bounds = array("Q", [0])
        self._counts = np.zeros(token_type.vocab_size, dtype=np.int64)

    def append(self, tokens: np.ndarray, num_text_bytes: int, ends_document: bool) -> None:
        """Add tokens ``[n]`` of the current document."""
        if self._tokens is None:
            self._tokens = self._files.enter_context(written_whole(self._stem.with_suffix(".tokens")))
        self._counts += np.bincount(tokens, minlength=self._type.vocab_size)
        self._buffer += tokens.astype(self._type.dtype).tobytes()
        self._num_tokens += len(tokens)
        self._num_text_bytes += num_text_bytes
        if ends_document:
            self._bounds.append(self._num_tokens)
        while len(self._buffer) >= BLOCK_BYTES:
            self._write_block(BLOCK_BYTES)

    def finish(self) -> SplitInfo | None:
        """Write what remains, and what describes the tokens; None where there are none, and no file."""
        if self._tokens is None:
            return None
        if self._buffer:
            self._write_block(len(self._buffer))
        index = np.frombuffer(self._bounds, dtype=np.uint64).astype(_INDEX).tobytes()
        counts = self._counts.astype(_INDEX).tobytes()
        write_whole(self._stem.with_suffix(".index"), index)
        write_whole(self._stem.with_suffix(".counts"), counts)
        return SplitInfo(
            num_tokens=self._num_tokens,
            num_documents=len(self._bounds) - 1,
            num_text_bytes=self._num_text_bytes,
            tokens_sha256=tuple(self._digests),
            index_sha256=digest(index),
            counts_sha256=digest(counts),
        )

    def _write_block(self, size: int) -> None:
        assert self._tokens is not None
        block = bytes(self._buffer[:size])
        del self._buffer[:size]
        self._digests.append(digest(block))
        self._tokens.write(block)


@dataclass(frozen=True)
class TokenShard:
    """One split of a shard on the disk, its tokens and index mapped into memory.

    Raises:
        DataError: by each method, for a missing file, a size that is no whole number of tokens or another than was written, a token
            outside the vocabulary (its offset is named), or contents that changed.
    """

    stem: Path
    info: SplitInfo
    token_type: TokenType
    _verified: set[int] = field(default_factory=set, compare=False, repr=False)

    @property
    def path(self) -> Path:
        """The file of tokens."""
        return self.stem.with_suffix(".tokens")

    @cached_property
    def tokens(self) -> np.ndarray:
        """Token ids ``[num_tokens]``, of which nothing is verified yet."""
        self.check_size()
        return self._map(self.path, self.token_type.dtype)

    @cached_property
    def bounds(self) -> np.ndarray:
        """Where each document starts, and the number of tokens at the end: uint64 ``[num_documents + 1]``, verified."""
        return self._small(".index", self.info.num_documents + 1, self.info.index_sha256)

    @property
    def counts(self) -> np.ndarray:
        """How often each token of the vocabulary occurs, uint64 ``[vocab_size]``, verified."""
        return self._small(".counts", self.token_type.vocab_size, self.info.counts_sha256)

    def check_size(self) -> None:
        """Raise unless the tokens are as many as were written."""
        path, dtype = self.path, self.token_type.dtype
        try:
            size = path.stat().st_size
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error}. {_AGAIN}") from error
        if size % dtype.itemsize:
            raise DataError(
                f"{path} has {size} bytes, which is no whole number of {self.token_type.name} tokens of {dtype.itemsize} "
                f"bytes: the file was cut off, or its dtype is another. {_AGAIN}"
            )
        if size // dtype.itemsize != self.info.num_tokens:
            raise DataError(
                f"{path} holds {size // dtype.itemsize} tokens of {self.token_type.name}; {self.info.num_tokens} were written: "
                f"the file was cut off, or its dtype is another. {_AGAIN}"
            )

    @property
    def num_blocks(self) -> int:
        return len(self.info.tokens_sha256)

    def verify_block(self, number: int) -> None:
        """Read a block of tokens and compare it with what was written; once."""
        if number in self._verified:
            return
        dtype = self.token_type.dtype
        size = BLOCK_BYTES // dtype.itemsize
        block = self.tokens[number * size : (number + 1) * size]
        outside = np.flatnonzero(block >= self.token_type.vocab_size)
        if len(outside):
            offset = number * size + int(outside[0])
            raise DataError(
                f"{self.path}: token {int(self.tokens[offset])} at offset {offset} (byte {offset * dtype.itemsize}) is outside "
                f"the vocabulary of {self.token_type.vocab_size}: the file is damaged, or its dtype is not "
                f"{self.token_type.name}. {_AGAIN}"
            )
        if digest(block.data) != self.info.tokens_sha256[number]:
            raise DataError(
                f"{self.path} is not what was prepared: the SHA-256 of its bytes {number * BLOCK_BYTES} to "
                f"{min((number + 1) * BLOCK_BYTES, self.info.num_tokens * dtype.itemsize) - 1} is another. {_AGAIN}"
            )
        self._verified.add(number)

    def verify_tokens(self) -> None:
        """Read all tokens and compare them with what was written."""
        self.check_size()
        for number in range(self.num_blocks):
            self.verify_block(number)

    def read(self, start: int, stop: int) -> np.ndarray:
        """A copy of the tokens ``[start, stop)``, int64; their blocks are verified first."""
        size = BLOCK_BYTES // self.token_type.dtype.itemsize
        for number in range(start // size, -(-stop // size)):
            self.verify_block(number)
        return self.tokens[start:stop].astype(np.int64)

    def _small(self, suffix: str, length: int, sha256: str) -> np.ndarray:
        path = self.stem.with_suffix(suffix)
        try:
            size = path.stat().st_size
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error}. {_AGAIN}") from error
        if size != length * _INDEX.itemsize:
            raise DataError(
                f"{path} has {size} bytes; {length} numbers of {_INDEX.itemsize} bytes were written: the file was cut off, or is "
                f"another. {_AGAIN}"
            )
        numbers = self._map(path, _INDEX)
        if digest(numbers.data) != sha256:
            raise DataError(f"{path} is not what was prepared: its SHA-256 is another. {_AGAIN}")
        return numbers

    def _map(self, path: Path, dtype: np.dtype[Any]) -> np.ndarray:
        try:
            mapped: np.ndarray = np.memmap(path, dtype=dtype, mode="r")
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read: {error}. Give access to it, or prepare the data again") from error
        return mapped


def verify_shards(shards: Sequence[TokenShard], done: Callable[[int], None] = lambda num_bytes: None) -> None:
    """Compare every byte of the shards with what was written, in threads.

    done: told the bytes of each block.

    Raises:
        DataError: for the first shard, and the first block in it, that is not what was written.
    """

    def verify(part: tuple[TokenShard, int]) -> None:
        shard, block = part
        shard.verify_block(block)
        done(min(BLOCK_BYTES, shard.info.num_tokens * shard.token_type.dtype.itemsize - block * BLOCK_BYTES))

    for shard in shards:
        _ = shard.tokens, shard.bounds, shard.counts
    parts = [(shard, block) for shard in shards for block in range(shard.num_blocks)]
    # Hashing lets go of the interpreter's lock.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        for _ in threads.map(verify, parts):
            pass


class TokenStream:
    """The tokens of shards, one after another, as if they were in one file; a document never spans two shards.

    name: what messages call it.
    """

    def __init__(self, name: str, shards: Sequence[TokenShard]) -> None:
        self.name = name
        self.shards = tuple(shard for shard in shards if shard.info.num_tokens)
        self._first_token = np.concatenate([[0], np.cumsum([s.info.num_tokens for s in self.shards])]).astype(np.int64)

    @property
    def num_tokens(self) -> int:
        return int(self._first_token[-1])

    @property
    def num_documents(self) -> int:
        return sum(shard.info.num_documents for shard in self.shards)

    @property
    def num_text_bytes(self) -> int:
        return sum(shard.info.num_text_bytes for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        """Bytes of the token files."""
        return sum(shard.info.num_tokens * shard.token_type.dtype.itemsize for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """A checksum of tokens and documents, from the checksums of the files: nothing is read."""
        parts = [asdict(shard.info) | {"dtype": shard.token_type.name} for shard in self.shards]
        return digest(canonical(parts))

    def token_counts(self, vocab_size: int) -> np.ndarray:
        """How often each token of the vocabulary occurs, int64 ``[vocab_size]``."""
        counts = np.zeros(vocab_size, dtype=np.int64)
        for shard in self.shards:
            counts += shard.counts.astype(np.int64)
        return counts

    def read(self, start: int, stop: int) -> np.ndarray:
        """A copy of the tokens ``[start, stop)``, int64.

        Raises:
            DataError: if they are not what was prepared.
        """
        parts = [shard.read(first, last) for shard, _, first, last in self._parts(start, stop)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Offsets at which a document starts, among ``[start, stop)``, int64."""
        found = []
        for shard, base, first, last in self._parts(start, stop):
            low, high = np.searchsorted(shard.bounds[:-1], np.array([first, last], dtype=np.uint64))
            found.append(shard.bounds[low:high].astype(np.int64) + base)
        return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)

    def bounds_of_documents(self, start: int, stop: int) -> np.ndarray:
        """Where each document that has a token in ``[start, stop)`` starts, and where the last of them ends, int64."""
        found: list[np.ndarray] = []
        for shard, base, first, last in self._parts(start, stop):
            low = int(np.searchsorted(shard.bounds, np.uint64(first), side="right")) - 1
            high = int(np.searchsorted(shard.bounds, np.uint64(last), side="left"))
            bounds = shard.bounds[low : high + 1].astype(np.int64) + base
            # The end of a shard is the start of the next one.
            found.append(bounds[1:] if found else bounds)
        return np.concatenate(found)

    def num_longer_documents(self, length: int) -> int:
        """Number of documents of more than `length` tokens."""
        return sum(int((np.diff(shard.bounds) > length).sum()) for shard in self.shards)

    def _parts(self, start: int, stop: int) -> Iterator[tuple[TokenShard, int, int, int]]:
        """Of each shard that has tokens of ``[start, stop)``: the offset of its first token, and which of its own they are."""
        number = int(np.searchsorted(self._first_token, start, side="right")) - 1
        while number < len(self.shards) and self._first_token[number] < stop:
            base, end = int(self._first_token[number]), int(self._first_token[number + 1])
            yield self.shards[number], base, max(start, base) - base, min(stop, end) - base
            number += 1
