"""Prepare a corpus once: list, split, tokenize, write; later runs on the same folder find it there.

``data.json`` is written last: a folder without it (`longspan.data.prepared`) was not finished, and the next call goes on with what
is done, which it verifies first.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from longspan.data.files import digest, locked, remove_leftovers, sync_folder, with_checksum, write_whole
from longspan.data.hub import is_inside
from longspan.data.prepared import MANIFEST, MANIFEST_OF_FORMAT_1, read_manifest, splits_of
from longspan.data.reading import read_documents
from longspan.data.recipe import Recipe
from longspan.data.shards import ShardTask, finished_shard, open_shard
from longspan.data.sources import ListedSource, list_source
from longspan.data.split import SplitRule, split_rule
from longspan.data.tokenizer import (
    BPE,
    BYTES,
    END_OF_DOCUMENT,
    ByteTokenizer,
    Tokenizer,
    open_tokenizer,
    train_bpe,
)
from longspan.data.tokens import SPLITS, TOKENS_FORMAT, verify_shards
from longspan.data.workers import make_shards
from longspan.errors import DataError

# A BPE's merges settle long before this; more text only takes longer.
_SAMPLE_CHARACTERS = 4_000_000
_MOST_SAMPLED_SHARDS = 256

_SHARD_FILE = re.compile(r"(shard|train|validation)-\d{2,}-\d{5,}\.(json|tokens|index|counts)")


class Progress(Protocol):
    """What is told how far a preparation is."""

    def begin(self, what: str, total: int | None) -> None:
        """A part of the work begins, of `total` bytes; None where nobody knows how many."""
        ...

    def advance(self, num_bytes: int) -> None: ...


class _Silent:
    def begin(self, what: str, total: int | None) -> None: ...

    def advance(self, num_bytes: int) -> None: ...


def prepare_corpus(recipe: Recipe, folder: Path, num_workers: int = 1, progress: Progress | None = None) -> float:
    """Write the prepared data of `recipe` into `folder`, unless it is there already; return the seconds that it took.

    What an earlier call finished before it was killed is verified and kept; the result is the same, byte for byte, as that of a
    call that was not, whatever the number of processes. No more than a few MB of text are held in memory by each process.

    Args:
        num_workers: processes that make shards.

    Raises:
        DataError: if the source cannot be read, `folder` holds data of another recipe or version, another process is preparing
        it, or it
            cannot be written to.
    """
    start = time.perf_counter()
    progress = progress or _Silent()
    if _exists(folder / MANIFEST) or _exists(folder / MANIFEST_OF_FORMAT_1):
        _check_same_recipe(recipe, folder)
        return time.perf_counter() - start
    for source in recipe.source:
        if is_inside(folder, source):
            raise DataError(
                f"{folder} lies inside the data set {source!r}, which would take it for a part of itself. Give another "
                "folder, outside it"
            )
    progress.begin("listing the sources", None)
    listed = [_listed(recipe, source) for source in recipe.source]
    rules = [_rule(recipe, source) for source in listed]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone_in(folder):
            remove_leftovers(folder)
            progress.begin("making the tokenizer", None)
            tokenizer, end_of_document = _make_tokenizer(recipe, listed, rules)
            write_whole(folder / "tokenizer.json", tokenizer.to_json().encode())
            tasks = _tasks(recipe, folder, listed, rules, tokenizer)
            done = _verified(tasks, progress)
            sizes = [portion.num_bytes for source in listed for portion in source.portions]
            missing = [(task, size) for task, size in zip(tasks, sizes, strict=True) if task.description not in done]
            total = sum(size for _, size in missing)
            progress.begin("tokenizing", None if any(size == 0 for _, size in missing) else total)
            make_shards([task for task, _ in missing], tokenizer, end_of_document, num_workers, progress.advance)
            _finish(recipe, folder, tasks, tokenizer, end_of_document)
    except OSError as error:
        raise DataError(
            f"the prepared data could not be written to {folder}: {error}. Make room or give access and run the same "
            "command again, which "
            "goes on with what is done; or give another data.folder"
        ) from error
    return time.perf_counter() - start


def _listed(recipe: Recipe, source: str) -> ListedSource:
    return list_source(source, recipe.suffixes, recipe.text_key, recipe.max_bytes, recipe.seed, recipe.shard_bytes)


def _rule(recipe: Recipe, source: ListedSource) -> SplitRule:
    documents = (
        document
        for item in source.items
        for document in read_documents(item, recipe.text_key, source.skips_undecodable)
    )
    return split_rule(documents, recipe.validation_fraction, recipe.seed, source.name)


def _make_tokenizer(
    recipe: Recipe, sources: Sequence[ListedSource], rules: Sequence[SplitRule]
) -> tuple[Tokenizer, str]:
    """The tokenizer of a recipe, and the text of the token that ends a document."""
    if recipe.tokenizer == BYTES:
        return ByteTokenizer(), END_OF_DOCUMENT
    if recipe.tokenizer == BPE:
        return train_bpe(_sample(recipe, sources, rules), recipe.vocab_size), END_OF_DOCUMENT
    return open_tokenizer(Path(recipe.tokenizer), recipe.end_of_document)


def _sample(recipe: Recipe, sources: Sequence[ListedSource], rules: Sequence[SplitRule]) -> Iterator[str]:
    """Training text for a tokenizer: the beginnings of portions spread evenly over all of them, the same amount of each."""
    portions = [
        (source, rule, portion) for source, rule in zip(sources, rules, strict=True) for portion in source.portions
    ]
    count = min(len(portions), _MOST_SAMPLED_SHARDS)
    for index in range(count):
        source, rule, portion = portions[index * len(portions) // count]
        num_characters = 0
        documents = (
            document
            for item in portion.items
            for document in read_documents(item, recipe.text_key, source.skips_undecodable)
        )
        for document in documents:
            if rule.side(document.name) == "validation" and not rule.cut:
                continue
            text = next(iter(document.pieces), "")
            if rule.cut:
                text = text[: max(1, int(len(text) * (1.0 - rule.fraction)))]
            yield text
            num_characters += len(text)
            if num_characters >= _SAMPLE_CHARACTERS // count:
                break


def _tasks(
    recipe: Recipe, folder: Path, sources: Sequence[ListedSource], rules: Sequence[SplitRule], tokenizer: Tokenizer
) -> list[ShardTask]:
    sha256 = digest(tokenizer.to_json().encode())
    return [
        ShardTask(
            folder=str(folder),
            source=index,
            number=number,
            items=portion.items,
            rule=rule,
            text_key=recipe.text_key,
            skip_undecodable=source.skips_undecodable,
            tokenizer_sha256=sha256,
            vocab_size=tokenizer.vocab_size,
        )
        for index, (source, rule) in enumerate(zip(sources, rules, strict=True))
        for number, portion in enumerate(source.portions)
    ]


def _verified(tasks: Sequence[ShardTask], progress: Progress) -> set[Path]:
    """The descriptions of the shards that are done already, and what they should be."""
    found = {task.description: shard for task in tasks if (shard := finished_shard(task)) is not None}
    if found:
        sizes = [s.info.num_tokens * s.token_type.dtype.itemsize for s in splits_of(list(found.values()))]
        progress.begin(f"verifying {len(found)} shards that are done", sum(sizes))
    whole = set()
    for description, shard in found.items():
        with contextlib.suppress(DataError):
            verify_shards(splits_of([shard]), progress.advance)
            whole.add(description)
    return whole


def _finish(
    recipe: Recipe, folder: Path, tasks: Sequence[ShardTask], tokenizer: Tokenizer, end_of_document: str
) -> None:
    """Remove what does not belong to the data, and write what says that it is whole."""
    sources: list[dict[str, Any]] = [{"name": name, "shards": []} for name in recipe.source]
    kept = set()
    for task in tasks:
        body, shard = open_shard(task.description, {split: task.stem(split) for split in SPLITS}, "")
        sources[task.source]["shards"].append(shard.description_sha256)
        kept |= {task.description} | {
            task.stem(split).with_suffix(suffix)
            for split in shard.splits
            for suffix in (".tokens", ".index", ".counts")
        }
    for path in folder.iterdir():
        if path not in kept and _SHARD_FILE.fullmatch(path.name):
            path.unlink()
    sync_folder(folder)
    body = {
        "format": TOKENS_FORMAT,
        "recipe": recipe.as_json(),
        "vocab_size": tokenizer.vocab_size,
        "end_of_document": end_of_document,
        "tokenizer_sha256": digest(tokenizer.to_json().encode()),
        "sources": sources,
    }
    write_whole(folder / MANIFEST, with_checksum(body))
    sync_folder(folder)


def _check_same_recipe(recipe: Recipe, folder: Path) -> None:
    found = read_manifest(folder)["recipe"]
    expected = recipe.as_json()
    if found != expected:
        changes = "; ".join(
            f"{key} was {found.get(key)!r}, now {expected.get(key)!r}"
            for key in {**expected, **found}
            if found.get(key) != expected.get(key)
        )
        raise DataError(
            f"{folder} holds data prepared otherwise: {changes}. Give another data.folder, or remove this one"
        )


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes from preparing the same folder; the lock ends with this process."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(folder))
        except BlockingIOError:
            raise DataError(
                f"another process is preparing {folder} now. Wait until it is done, or give another data.folder"
            ) from None
        yield


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:
        raise DataError(f"{path} cannot be looked for: {error}. Give another data.folder") from error
