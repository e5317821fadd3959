"""A prepared folder as it is read: shards, the tokenizer, and ``data.json``, which names them all with their checksums."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from longspan.data.files import digest, read_checked
from longspan.data.shards import Shard, open_shard
from longspan.data.tokenizer import Tokenizer, load_tokenizer
from longspan.data.tokens import SPLITS, TOKENS_FORMAT, SplitName, TokenShard, TokenStream, verify_shards
from longspan.errors import DataError

MANIFEST = "data.json"
MANIFEST_OF_FORMAT_1 = "recipe.json"


@dataclass(frozen=True)
class PreparedData:
    """Token files and the tokenizer that made them.

    train: the training text of all sources, one after another. train_by_source: that of each. num_empty: documents without text,
    which were left out.
    """

    sources: tuple[str, ...]
    train: TokenStream
    train_by_source: tuple[TokenStream, ...]
    validation: TokenStream
    tokenizer: Tokenizer
    tokenizer_sha256: str
    num_empty: int

    def token_counts(self, weights: Sequence[float] = ()) -> np.ndarray:
        """How often each token of the vocabulary occurs in the training text, float64 ``[vocab_size]``.

        weights: of the sources, as much of each as is trained on; none takes them as they are.
        """
        size = self.tokenizer.vocab_size
        if not weights:
            return self.train.token_counts(size).astype(np.float64)
        shares = np.array(weights) / sum(weights)
        mixed = [
            share * stream.token_counts(size) / stream.num_tokens
            for share, stream in zip(shares, self.train_by_source, strict=True)
        ]
        return self.train.num_tokens * np.sum(mixed, axis=0)

    @property
    def fingerprint(self) -> dict[str, str]:
        """Checksums by which a checkpoint recognizes its data."""
        return {
            "train": self.train.fingerprint,
            "validation": self.validation.fingerprint,
            "tokenizer": self.tokenizer_sha256,
        }


def open_prepared(folder: Path, verify: bool = True) -> PreparedData:
    """Open what `prepare_corpus` wrote.

    verify: check every byte now. False checks sizes and what describes the tokens; each block of tokens is then checked before
    it is first used.

    Raises:
        DataError: if a file is missing, damaged, of another version, or does not belong to the others.
    """
    remedy = f"Prepare the data again: remove {folder}"
    manifest = read_manifest(folder)
    with as_described(folder, remedy):
        tokenizer = _tokenizer_of(folder, manifest, remedy)
        by_source = [
            [open_shard_of(folder, source, number, sha256, remedy) for number, sha256 in enumerate(entry["shards"])]
            for source, entry in enumerate(manifest["sources"])
        ]
        names = tuple(str(entry["name"]) for entry in manifest["sources"])
    everything = [shard for shards in by_source for shard in shards]
    if not any(split in shard.splits for shard in everything for split in SPLITS):
        raise DataError(f"{folder / MANIFEST} names no shard that holds tokens. {remedy}")
    for split in splits_of(everything):
        split.check_size()
    if verify:
        verify_shards(splits_of(everything))
    return PreparedData(
        sources=names,
        train=_stream("the training text", everything, "train"),
        train_by_source=tuple(
            _stream(f"the training text of {name}", shards, "train")
            for name, shards in zip(names, by_source, strict=True)
        ),
        validation=_stream("the held-out text", everything, "validation"),
        tokenizer=tokenizer,
        tokenizer_sha256=manifest["tokenizer_sha256"],
        num_empty=sum(shard.num_empty for shard in everything),
    )


def open_tokenizer_of(folder: Path) -> Tokenizer:
    """The tokenizer of a prepared folder, which need not hold its shards any more; raises as `open_prepared`."""
    remedy = f"Prepare the data again: remove {folder}"
    manifest = read_manifest(folder)
    with as_described(folder, remedy):
        return _tokenizer_of(folder, manifest, remedy)


def _tokenizer_of(folder: Path, manifest: dict[str, Any], remedy: str) -> Tokenizer:
    """The tokenizer of a prepared folder, which must be the one that it was prepared with."""
    path = folder / "tokenizer.json"
    tokenizer = load_tokenizer(path, manifest["end_of_document"])
    if digest(tokenizer.to_json().encode()) != manifest["tokenizer_sha256"]:
        raise DataError(f"{path} is not the tokenizer that the data of {folder / MANIFEST} was prepared with. {remedy}")
    if tokenizer.vocab_size != manifest["vocab_size"]:
        raise DataError(
            f"{folder} was prepared for a vocabulary of {manifest['vocab_size']}; the tokenizer has {tokenizer.vocab_size}. "
            f"{remedy}"
        )
    return tokenizer


def open_shard_of(folder: Path, source: int, number: int, sha256: str, remedy: str) -> Shard:
    """A shard of a prepared folder, which must be the one that the folder was finished with."""
    path = folder / f"shard-{source:02d}-{number:05d}.json"
    stems = {split: folder / f"{split}-{source:02d}-{number:05d}" for split in SPLITS}
    _, shard = open_shard(path, stems, remedy)
    if shard.description_sha256 != sha256:
        raise DataError(f"{path} is not the one that {folder / MANIFEST} was written for. {remedy}")
    return shard


def num_prepared_bytes(folder: Path) -> int:
    """Bytes of all files of tokens in a folder; none of one that is not there."""
    return sum(path.stat().st_size for path in folder.glob("*.tokens"))


def _stream(name: str, shards: Sequence[Shard], split: SplitName) -> TokenStream:
    return TokenStream(name, [shard.splits[split] for shard in shards if split in shard.splits])


def splits_of(shards: Sequence[Shard]) -> list[TokenShard]:
    """The shards' files of tokens, those of both splits."""
    return [split for shard in shards for split in shard.splits.values()]


def read_manifest(folder: Path) -> dict[str, Any]:
    """What ``data.json`` of a folder says.

    Raises:
        DataError: if it is missing, damaged, or of another version.
    """
    path = folder / MANIFEST
    again = f"Prepare the data again: remove {folder}, or give another folder"
    if not path.is_file():
        if (folder / MANIFEST_OF_FORMAT_1).is_file():
            raise DataError(
                f"{folder} was prepared by another version of longspan, which wrote its index as JSON (format longspan-tokens-1); "
                f"this version reads {TOKENS_FORMAT}. {again}"
            )
        raise DataError(
            f"{folder} holds no prepared data: it has no {MANIFEST}. Prepare it with longspan prepare, which goes on with what an "
            "earlier call has done"
        )
    body = read_checked(path, again)
    if body.get("format") != TOKENS_FORMAT:
        raise DataError(
            f"{folder} was prepared by another version of longspan (format {body.get('format')!r}); this version reads "
            f"{TOKENS_FORMAT}. {again}"
        )
    return body


@contextlib.contextmanager
def as_described(folder: Path, remedy: str) -> Iterator[None]:
    """Raise DataError where what a ``data.json`` says, whose checksum is right, is not what is looked for in the block."""
    try:
        yield
    except DataError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{folder / MANIFEST} does not describe prepared data: {type(error).__name__}: {error}. {remedy}"
        ) from error


def is_prepared(folder: Path) -> bool:
    """Whether a folder holds prepared data, finished or not, of whatever version."""
    named = (MANIFEST, MANIFEST_OF_FORMAT_1)
    return any((folder / name).is_file() for name in named) or any(folder.glob("shard-*.json"))
