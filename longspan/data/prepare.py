"""Prepare a corpus once: read, split, tokenize, write; later runs on the same folder find it there."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longspan.data.documents import Document, read_corpus
from longspan.data.tokenizer import ByteTokenizer, Kind, Tokenizer, load_tokenizer, train_bpe
from longspan.data.tokens import TokenFile, open_token_file, write_token_file, write_whole
from longspan.errors import DataError

# A BPE's merges settle long before this; more text only takes longer.
_TOKENIZER_TRAINING_BYTES = 4_000_000


@dataclass(frozen=True)
class Recipe:
    """What decides the contents of prepared data, apart from the text itself."""

    source: str
    suffixes: tuple[str, ...]
    text_key: str
    max_bytes: int
    validation_fraction: float
    tokenizer: Kind
    vocab_size: int
    seed: int


@dataclass(frozen=True)
class PreparedData:
    """Verified token files and the tokenizer that made them."""

    train: TokenFile
    validation: TokenFile
    tokenizer: Tokenizer

    @property
    def fingerprint(self) -> dict[str, str]:
        """Checksums by which a checkpoint recognizes its data."""
        return {
            "train": self.train.info.sha256,
            "validation": self.validation.info.sha256,
            "tokenizer": self.train.info.tokenizer_sha256,
        }


def prepare_corpus(recipe: Recipe, folder: Path) -> float:
    """Write the prepared data of `recipe` into `folder`, unless it is there already; return the seconds that it took.

    Raises:
        DataError: if the source cannot be read, `folder` holds data of another recipe, or it cannot be written to.
    """
    start = time.perf_counter()
    recipe_path = folder / "recipe.json"
    written = json.dumps(_recipe_as_json(recipe), indent=1)
    if _exists(recipe_path):
        _check_same_recipe(recipe, recipe_path)
        return time.perf_counter() - start
    corpus = read_corpus(
        recipe.source, recipe.suffixes, recipe.text_key, recipe.max_bytes, recipe.validation_fraction, recipe.seed
    )
    tokenizer: Tokenizer = ByteTokenizer()
    if recipe.tokenizer == "bpe":
        texts = [document.text for document in corpus.train]
        tokenizer = train_bpe(texts, recipe.vocab_size, _TOKENIZER_TRAINING_BYTES)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
        for name, documents in (("train", corpus.train), ("validation", corpus.validation)):
            _write_split(folder / f"{name}.bin", documents, tokenizer)
        # Written last: its presence says that the rest is whole.
        write_whole(recipe_path, written.encode())
    except OSError as error:
        raise DataError(
            f"the prepared data could not be written to {folder}: {error}. Make room or give access, or give another "
            "data.folder"
        ) from error
    return time.perf_counter() - start


def open_prepared(folder: Path) -> PreparedData:
    """Open what `prepare_corpus` wrote, checking every byte of it.

    Raises:
        DataError: if a file is missing, damaged, or does not belong to the others.
    """
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    checksum = _checksum(tokenizer)
    files = {name: open_token_file(folder / f"{name}.bin") for name in ("train", "validation")}
    for file in files.values():
        if file.info.tokenizer_sha256 != checksum:
            raise DataError(
                f"{folder / 'tokenizer.json'} is not the tokenizer that {file.path.name} was prepared with. "
                f"Prepare the data again: remove {folder}"
            )
        if file.info.vocab_size != tokenizer.vocab_size:
            raise DataError(
                f"{file.path} was prepared for a vocabulary of {file.info.vocab_size}; the tokenizer has "
                f"{tokenizer.vocab_size}. Prepare the data again: remove {folder}"
            )
    return PreparedData(files["train"], files["validation"], tokenizer)


def _write_split(path: Path, documents: tuple[Document, ...], tokenizer: Tokenizer) -> None:
    encoded = tokenizer.encode([document.text for document in documents])
    for tokens in encoded:
        tokens.append(tokenizer.end_of_document)
    num_text_bytes = sum(len(document.text.encode()) for document in documents)
    write_token_file(path, encoded, tokenizer.vocab_size, num_text_bytes, _checksum(tokenizer))


def _checksum(tokenizer: Tokenizer) -> str:
    return hashlib.sha256(tokenizer.to_json().encode()).hexdigest()


def _recipe_as_json(recipe: Recipe) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(recipe).items()}


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:
        raise DataError(f"{path} cannot be looked for: {error}. Give another data.folder") from error


def _check_same_recipe(recipe: Recipe, path: Path) -> None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read: {error}. Remove {path.parent} to prepare the data again") from error
    expected = _recipe_as_json(recipe)
    if found != expected:
        keys = [key for key in expected if not isinstance(found, dict) or found.get(key) != expected[key]]
        changes = "; ".join(
            f"{k} was {found.get(k) if isinstance(found, dict) else None!r}, now {expected[k]!r}" for k in keys
        )
        raise DataError(
            f"{path.parent} holds data prepared otherwise: {changes}. Give another data.folder, or remove this one"
        )
