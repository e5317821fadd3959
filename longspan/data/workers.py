"""Shards made by several processes at once; which of them makes which has no effect on what is written."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from longspan.data.shards import ShardTask, make_shard
from longspan.data.tokenizer import Tokenizer, load_tokenizer
from longspan.errors import DataError

_SECONDS_BETWEEN_REPORTS = 0.2


def make_shards(
    tasks: Sequence[ShardTask],
    tokenizer: Tokenizer,
    end_of_document: str,
    num_workers: int,
    done: Callable[[int], None],
) -> None:
    """Make shards whose tokenizer lies in their folder, too.

    done: told the bytes of text that have been tokenized since it was last told.

    Raises:
        DataError: if text cannot be read, or a process died. OSError: if a shard cannot be written.
    """
    num_workers = min(num_workers, len(tasks))
    if num_workers > 1:
        _make_in_processes(tasks, end_of_document, num_workers, done)
        return
    for task in tasks:
        make_shard(task, tokenizer, done)


def _make_in_processes(
    tasks: Sequence[ShardTask], end_of_document: str, num_workers: int, done: Callable[[int], None]
) -> None:
    # Forked processes would not have the threads of this one, and might have their locks, closed.
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    told = 0
    queue = list(reversed(tasks))
    processes: dict[Any, BaseProcess] = {}
    try:
        for _ in range(num_workers):
            ours, theirs = context.Pipe()
            process: BaseProcess = context.Process(target=_serve, args=(theirs, counter, end_of_document), daemon=True)
            process.start()
            theirs.close()
            processes[ours] = process
            ours.send(queue.pop())
        working = set(processes)
        while working:
            for connection in wait(list(working), _SECONDS_BETWEEN_REPORTS):
                assert isinstance(connection, Connection)
                _raise_failure(connection, processes[connection])
                if queue:
                    connection.send(queue.pop())
                else:
                    working.remove(connection)
            done(counter.value - told)
            told = counter.value
    finally:
        for connection, process in processes.items():
            connection.close()
            process.terminate()
            process.join()


def _raise_failure(connection: Connection, process: BaseProcess) -> None:
    """Take a worker's answer; raise what it raised."""
    try:
        failure: Exception | None = connection.recv()
    except (EOFError, OSError) as error:
        process.join()
        raise DataError(
            f"a process that prepared the data ended with code {process.exitcode}: it may have been killed for memory. What "
            "is done is "
            "kept: run the same command again, with fewer --workers"
        ) from error
    if failure is not None:
        raise failure


def _serve(connection: Connection, counter: Any, end_of_document: str) -> None:
    """Make shards as they are asked for, until nobody asks any more."""
    # A signal of the terminal reaches the first process, which ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def done(num_bytes: int) -> None:
        with counter.get_lock():
            counter.value += num_bytes

    tokenizer: Tokenizer | None = None
    while True:
        try:
            task: ShardTask = connection.recv()
        except EOFError:
            return
        try:
            if tokenizer is None:
                tokenizer = load_tokenizer(Path(task.folder) / "tokenizer.json", end_of_document)
            make_shard(task, tokenizer, done)
        except (DataError, OSError) as error:
            connection.send(error)
        else:
            connection.send(None)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
