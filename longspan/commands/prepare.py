"""``longspan prepare``: text from files or data sets to token files, once, for any number of runs."""

from __future__ import annotations

import contextlib
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import tyro

from longspan.commands.options import parse_options, refuse
from longspan.data.recipe import ASKED_FOR, DEFAULT_SHARD_BYTES, Recipe
from longspan.errors import ConfigError, DataError, LongspanError
from longspan.launch import EXIT_DONE, EXIT_STOPPED, leave_cores_to_processes

_DESCRIPTION = """Turn text into token files that longspan train maps into memory, once for any number of runs.

  longspan prepare data/ --source books/ articles.jsonl --tokenizer llama/tokenizer.json --workers 8
  longspan train --data.prepared data/ --data.weights 0.7 0.3

Text may be as large as the disk: it is read as a stream. If it is stopped or killed, the same command goes on
with what is done, and the files are the same, byte for byte, as if nothing had happened. On a folder that is
finished it verifies every byte.

Exit codes: 0 done, 2 refused (the message says how to mend it), 75 stopped by SIGINT or SIGTERM.
"""


@dataclass(frozen=True)
class PrepareOptions:
    """What is prepared, how, and where to."""

    folder: tyro.conf.Positional[str]
    """Where the token files are written."""
    source: tuple[str, ...]
    """Folders; text files, each a document; .jsonl and .parquet files, each line or row one; python-stdlib; or
    hf:NAME?config=...&split=...&revision=... for a Hugging Face data set, streamed (a folder may stand for the name)."""
    suffixes: tuple[str, ...] = (".txt", ".jsonl", ".md", ".py", ".parquet")
    """Endings of the files to read in a folder."""
    text_key: str = "text"
    """Key of the text in a line of a .jsonl file, or its column."""
    max_bytes: int | None = None
    """Read about this many bytes of text of each source, of files chosen at random; None reads all."""
    validation_fraction: float = 0.01
    """Share of each source's documents that is held out, by a hash of their names."""
    tokenizer: str = "bpe"
    """A byte-level BPE trained on 4 million characters from all over the training text (bpe), bytes as they are
    (bytes), or the path of a tokenizer.json."""
    vocab_size: int = 32_768
    """Size of the BPE's vocabulary."""
    end_of_document: str | None = None
    """The token of a tokenizer.json that ends a document; None looks for a usual one, such as <|endoftext|>."""
    seed: int = 0
    """Decides which documents are held out, and which files are read under max-bytes."""
    shard_bytes: int = DEFAULT_SHARD_BYTES
    """Text of a shard: what a process makes at once, and what is lost if it is killed."""
    workers: int = 1
    """Processes. A single one uses all cores for a BPE or a tokenizer.json."""

    def check(self) -> None:
        """Raise ConfigError for a value out of its range."""
        if not self.source:
            raise ConfigError("--source is empty; it must name at least one source, such as a folder")
        for name in ("workers", "shard_bytes", "max_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
        if not 0.0 < self.validation_fraction < 1.0:
            raise ConfigError(f"--validation-fraction is {self.validation_fraction}; it must lie between 0 and 1")


def run(arguments: Sequence[str]) -> int:
    """Prepare as the arguments ask, and return the exit code."""
    options = parse_options(PrepareOptions, "prepare", _DESCRIPTION, arguments)
    try:
        options.check()
        with _stopped_by_signals():
            _prepare(options)
    except LongspanError as error:
        return refuse(_in_words_of_options(error))
    except KeyboardInterrupt:
        sys.stdout.write("\nStopped. The same command goes on with the shards that are done.\n")
        return EXIT_STOPPED
    return EXIT_DONE


def _prepare(options: PrepareOptions) -> None:
    from longspan.data.prepare import prepare_corpus
    from longspan.data.prepared import MANIFEST, open_prepared

    start = time.perf_counter()
    folder = Path(options.folder)
    recipe = Recipe.of(options, options.seed, options.shard_bytes)
    if options.workers > 1:
        leave_cores_to_processes()
    was_there = (folder / MANIFEST).exists()
    with _Bar() as bar:
        prepare_corpus(recipe, folder, options.workers, bar)
        data = open_prepared(folder, verify=was_there)
    train, validation = data.train, data.validation
    num_bytes = train.num_text_bytes + validation.num_text_bytes
    seconds = time.perf_counter() - start
    speed = f"{num_bytes / seconds / 1e6:.1f} MB of text a second"
    what = "was prepared before; every byte verified" if was_there else speed
    lines = {
        "data": f"{folder}: {num_bytes / 1e6:,.1f} MB of text, vocabulary {data.tokenizer.vocab_size:,}, {seconds:.0f} s; {what}",
        "to train on": f"{train.num_tokens:,} tokens of {train.num_documents:,} documents",
        "held out": f"{validation.num_tokens:,} tokens of {validation.num_documents:,} documents",
        "left out": f"{data.num_empty:,} documents without text",
        "go on with": f"longspan train --data.prepared {folder}",
    }
    if len(data.sources) > 1:
        for name, stream in zip(data.sources, data.train_by_source, strict=True):
            lines[f"  {name}"] = f"{stream.num_tokens:,} tokens to train on"
    sys.stdout.write("".join(f"{name:<12} {text}\n" for name, text in lines.items()))


class _Bar:
    """A bar for each part of the work, or a line now and then where there is no terminal."""

    _SECONDS_BETWEEN_LINES = 10.0

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        self._console = Console(highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(compact=True),
                console=self._console,
            )
        self._task: Any = None
        self._what, self._total, self._done = "", 0, 0
        self._next_line = 0.0

    def __enter__(self) -> _Bar:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def begin(self, what: str, total: int | None) -> None:
        self._what, self._total, self._done = what, total or 0, 0
        if self._progress is not None:
            if self._task is not None:
                self._progress.stop_task(self._task)
            self._task = self._progress.add_task(what, total=total)
        else:
            self._console.print(what, markup=False)
            self._next_line = time.perf_counter() + self._SECONDS_BETWEEN_LINES

    def advance(self, num_bytes: int) -> None:
        self._done += num_bytes
        if self._progress is not None:
            self._progress.advance(self._task, num_bytes)
        elif time.perf_counter() >= self._next_line:
            of = f" of {self._total / 1e6:,.0f}" if self._total else ""
            self._console.print(f"{self._what}: {self._done / 1e6:,.0f}{of} MB", markup=False)
            self._next_line = time.perf_counter() + self._SECONDS_BETWEEN_LINES


_KEY = re.compile(rf"\bdata\.({'|'.join(ASKED_FOR)})\b")


def _in_words_of_options(error: LongspanError) -> LongspanError:
    """The error with this command's options where it speaks of keys of ``longspan train``."""
    text = _KEY.sub(lambda match: "--" + match.group(1).replace("_", "-"), str(error))
    return DataError(text.replace("another data.folder", "another folder"))


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Raise KeyboardInterrupt for SIGTERM, too."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
