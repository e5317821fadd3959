"""Whether a prepared folder is, byte for byte, what `prepare_corpus` wrote: every file that it names, and all faults at once."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from longspan.data.files import digest
from longspan.data.prepared import MANIFEST, as_described, open_shard_of, read_manifest
from longspan.data.tokens import TokenShard
from longspan.errors import DataError

_AGAIN = "Prepare the data again"


@dataclass(frozen=True)
class FolderCheck:
    """What a prepared folder was found to be.

    num_files, num_bytes: of the files that are what was written. faults: for each of the others a message that names it.
    """

    num_files: int
    num_bytes: int
    faults: tuple[str, ...]

    @classmethod
    def of(cls, path: Path, check: Callable[[], None]) -> FolderCheck:
        """Of one file: `check` raises DataError, or OSError, unless it is what was written."""
        try:
            check()
            return cls(1, path.stat().st_size, ())
        except DataError as error:
            return cls(0, 0, (str(error),))
        except OSError as error:
            return cls(0, 0, (f"{path} cannot be read: {error}. {_AGAIN}",))

    def __add__(self, other: FolderCheck) -> FolderCheck:
        return FolderCheck(
            self.num_files + other.num_files, self.num_bytes + other.num_bytes, self.faults + other.faults
        )


def verify_prepared(folder: Path) -> FolderCheck:
    """Read every file of a prepared folder, in threads, and compare it with what was written.

    Digests say whether a byte has changed; an index must rise from zero to the number of tokens, and counts add up to it. Where the
    description of a shard is damaged, what it describes is not read.

    Raises:
        DataError: if there is no ``data.json``, or it is damaged, or of another version: nothing says then what was written.
    """
    manifest = read_manifest(folder)
    with as_described(folder, _AGAIN):
        shards = [
            (source, number, sha256)
            for source, entry in enumerate(manifest["sources"])
            for number, sha256 in enumerate(entry["shards"])
        ]
        tokenizer_sha256 = manifest["tokenizer_sha256"]

    def verify_tokenizer() -> None:
        if digest(tokenizer.read_bytes()) != tokenizer_sha256:
            raise DataError(
                f"{tokenizer} is not the one that the data was prepared with: its SHA-256 is another. {_AGAIN}"
            )

    tokenizer = folder / "tokenizer.json"
    found = FolderCheck.of(folder / MANIFEST, lambda: None) + FolderCheck.of(tokenizer, verify_tokenizer)
    # Hashing lets go of the interpreter's lock.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        for of_shard in threads.map(lambda named: _verify_shard(folder, *named), shards):
            found += of_shard
    return found


def _verify_shard(folder: Path, source: int, number: int, sha256: str) -> FolderCheck:
    path = folder / f"shard-{source:02d}-{number:05d}.json"
    splits: list[TokenShard] = []

    def verify_description() -> None:
        splits.extend(open_shard_of(folder, source, number, sha256, _AGAIN).splits.values())

    found = FolderCheck.of(path, verify_description)
    for split in splits:
        found += FolderCheck.of(split.path, split.verify_tokens)
        found += FolderCheck.of(split.stem.with_suffix(".index"), partial(_verify_index, split))
        found += FolderCheck.of(split.stem.with_suffix(".counts"), partial(_verify_counts, split))
    return found


def _verify_index(shard: TokenShard) -> None:
    bounds = shard.bounds.astype(np.int64)
    if bounds[0] != 0 or bounds[-1] != shard.info.num_tokens or (np.diff(bounds) < 1).any():
        raise DataError(
            f"{shard.stem.with_suffix('.index')} does not divide {shard.info.num_tokens} tokens into documents: where they start "
            f"must rise from 0 to the number of tokens. {_AGAIN}"
        )


def _verify_counts(shard: TokenShard) -> None:
    total = int(shard.counts.sum())
    if total != shard.info.num_tokens:
        raise DataError(
            f"{shard.stem.with_suffix('.counts')} counts {total} tokens; the shard has {shard.info.num_tokens}. {_AGAIN}"
        )
