"""Files that are whole or absent, and JSON in which no byte changes unnoticed."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from longspan.errors import DataError

_TEMPORARY = ".writing-"


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which appears as `path` when it is whole and on the disk; nothing is left of one that is not."""
    temporary = path.with_name(f"{_TEMPORARY}{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears under its name when it is whole."""
    with written_whole(path) as file:
        file.write(content)


def remove_leftovers(folder: Path) -> None:
    """Remove what a process that was killed has left half-written."""
    for path in folder.glob(f"{_TEMPORARY}*"):
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Wait until the names in `folder` are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a lock on a folder, for as long as the block or this process lasts; other processes of this host cannot have it.

    Raises:
        BlockingIOError: as the block is entered, where another one has it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def canonical(value: Any) -> bytes:
    """JSON that has one form for each value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def digest(content: bytes | memoryview) -> str:
    """SHA-256 in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def with_checksum(body: dict[str, Any]) -> bytes:
    """`body` as JSON, with the digest of itself; `read_checked` reads it."""
    return canonical(body | {"sha256": digest(canonical(body))}) + b"\n"


def read_checked(path: Path, remedy: str) -> dict[str, Any]:
    """What `with_checksum` wrote to `path`.

    Raises:
        DataError: if it cannot be read, or any byte of it has changed; the message ends with the remedy.
    """
    try:
        content = path.read_bytes()
        body: Any = json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read: {error}. {remedy}") from error
    if isinstance(body, dict):
        found = body.pop("sha256", None)
        if isinstance(found, str) and with_checksum(body) == content:
            return body
    raise DataError(f"{path} is not what was written: its checksum is another. {remedy}")
