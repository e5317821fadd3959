"""Checkpoints that are whole or absent: their folders, their manifests, and what is verified.

A checkpoint is a folder ``step-00000100`` of safetensors and JSON files and a manifest with the SHA-256 of each. It is
written under a temporary name, flushed to disk, and renamed: a crash at any instant leaves the complete ones as they
were. The manifest is canonical JSON with a checksum of itself, so that no byte of a checkpoint can change unnoticed.
Every rank writes files of its own (`longspan.train.saving`), and `complete_checkpoint` makes a checkpoint of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from longspan.data.files import sync_folder
from longspan.errors import CheckpointError
from longspan.faults import reached

CHECKPOINT_FORMAT = "longspan-checkpoint-2"
_FORMER_FORMATS = ("longspan-checkpoint-1",)
MANIFEST = "manifest.json"
_TEMPORARY = ".writing-"
_DISCARDED = ".removing-"
_DAMAGED = "damaged-"
_NAME = re.compile(r"step-([0-9]{8,})")


class WrittenFile(TypedDict):
    """What a manifest says of a file."""

    bytes: int
    sha256: str


def begin_checkpoint(folder: Path, step: int) -> bool:
    """Make the folder that the ranks write the checkpoint of a step into, empty; False if the checkpoint is there already.

    Raises:
        CheckpointError: if it cannot be made.
    """
    if _is_complete(folder / folder_name(step)):
        # The run was resumed from it and has made no step since.
        return False
    temporary = temporary_folder(folder, step)
    with _writing(folder, step):
        reached("checkpoint.begun", step)
        folder.mkdir(parents=True, exist_ok=True)
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir()
    return True


def complete_checkpoint(folder: Path, step: int, files: Mapping[str, WrittenFile], keep: int) -> Path:
    """Make a checkpoint of what was written and flushed, then remove all but the newest `keep` complete ones; return its path.

    Args:
        folder: of all checkpoints.
        step: which `begin_checkpoint` was called for.
        files: all files of the checkpoint.
        keep: how many complete checkpoints stay.

    Raises:
        CheckpointError: if that cannot be done. What was there before stays as it is.
    """
    temporary, final = temporary_folder(folder, step), folder / folder_name(step)
    with _writing(folder, step):
        write_synced(temporary / MANIFEST, _manifest(step, dict(files)))
        sync_folder(temporary)
        reached("checkpoint.written", step)
        if final.exists():
            # It lacks a file, or `begin_checkpoint` would have found it.
            shutil.rmtree(final)
        temporary.rename(final)
        sync_folder(folder)
        reached("checkpoint.renamed", step)
    for old in complete_checkpoints(folder)[:-keep]:
        # Under its own name it would look damaged to a resume if this were cut off.
        with contextlib.suppress(OSError):
            discarded = old.rename(folder / f"{_DISCARDED}{old.name}")
            reached("checkpoint.removing", step)
            shutil.rmtree(discarded, ignore_errors=True)
    return final


def abandon_checkpoint(folder: Path, step: int) -> None:
    """Remove what was written of a checkpoint that cannot be completed."""
    shutil.rmtree(temporary_folder(folder, step), ignore_errors=True)


@contextlib.contextmanager
def _writing(folder: Path, step: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        abandon_checkpoint(folder, step)
        raise not_written(folder, step, str(error)) from error


def not_written(folder: Path, step: int, why: str) -> CheckpointError:
    """The error for a checkpoint that the disk does not take."""
    return CheckpointError(
        f"the checkpoint of step {step} could not be written to {folder}: {why}. Earlier checkpoints are untouched: make "
        "room or give access, and go on with --resume"
    )


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints below `folder`, oldest first: those that have a manifest and every file of it."""
    return [path for path in all_checkpoints(folder) if _is_complete(path)]


def newest_checkpoint(folder: Path) -> Path:
    """The newest checkpoint below `folder`; what a crash left half-written does not count, what was damaged later does.

    Raises:
        CheckpointError: if there is none.
    """
    found = all_checkpoints(folder)
    if not found:
        raise CheckpointError(
            f"there is no complete checkpoint in {folder}: the run ended before its first, or is a model that was imported. Start "
            "a new run, with an imported model's weights by train.init"
        )
    return found[-1]


def remove_leftovers(folder: Path) -> None:
    """Remove what a crash left half-written or half-removed. Only before a run writes its own."""
    for path in folder.iterdir() if folder.is_dir() else []:
        if path.name.startswith((_TEMPORARY, _DISCARDED)):
            shutil.rmtree(path, ignore_errors=True)


def set_aside_newer(folder: Path, step: int) -> None:
    """Give the checkpoints of later steps than `step` a name under which they are no checkpoints: the run goes on without them."""
    for path in all_checkpoints(folder):
        match = _NAME.fullmatch(path.name)
        if match is not None and int(match.group(1)) > step:
            aside = folder / f"{_DAMAGED}{path.name}"
            with contextlib.suppress(OSError):
                if aside.exists():
                    shutil.rmtree(aside)
                path.rename(aside)


def verify_checkpoint(path: Path, part: int = 0, num_parts: int = 1) -> list[Path]:
    """Check every byte of a checkpoint, or every `num_parts`-th file from `part` on; return what was checked, the manifest first.

    Raises:
        CheckpointError: if a file is missing, damaged or not part of it; the message names the file.
    """
    files = read_manifest(path).files
    checked = list(files)[part::num_parts]
    for name in checked:
        verify_file(path, name, files)
    return [path / MANIFEST, *(path / name for name in checked)]


def verify_file(path: Path, name: str, files: Mapping[str, WrittenFile]) -> None:
    """Check every byte of a file of a checkpoint; `files` are its manifest's.

    Raises:
        CheckpointError: if it is missing, damaged or not part of the checkpoint; the message names the file.
    """
    expected = _expected(path, name, files)
    try:
        with (path / name).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.file_digest(file, "sha256").hexdigest() if size == expected["bytes"] else ""
    except OSError as error:
        raise damaged(path / name, f"cannot be read: {error}") from error
    _check_digest(path / name, size, digest, expected)


def read_verified(path: Path, name: str, files: Mapping[str, WrittenFile]) -> bytes:
    """The bytes of a small file of a checkpoint, of which every one was checked; raises as `verify_file`."""
    expected = _expected(path, name, files)
    try:
        content = (path / name).read_bytes()
    except OSError as error:
        raise damaged(path / name, f"cannot be read: {error}") from error
    _check_digest(path / name, len(content), hashlib.sha256(content).hexdigest(), expected)
    return content


def _expected(path: Path, name: str, files: Mapping[str, WrittenFile]) -> WrittenFile:
    if name not in files:
        raise damaged(path / name, "is not part of the checkpoint")
    return files[name]


def _check_digest(path: Path, size: int, digest: str, expected: WrittenFile) -> None:
    if size != expected["bytes"]:
        raise damaged(path, f"has {size} bytes; {expected['bytes']} were written")
    if digest != expected["sha256"]:
        raise damaged(path, "has changed since it was written: its SHA-256 is another")


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself."""

    step: int
    files: dict[str, WrittenFile]


def folder_name(step: Any) -> str:
    """The name of the folder of a step's checkpoint."""
    return f"step-{step:08d}" if type(step) is int else ""


def temporary_folder(folder: Path, step: int) -> Path:
    """Where a checkpoint is written before it is complete."""
    return folder / f"{_TEMPORARY}{folder_name(step)}"


def _manifest(step: Any, files: Mapping[str, Any]) -> bytes:
    body = {"files": files, "format": CHECKPOINT_FORMAT, "step": step}
    checksum = hashlib.sha256(_canonical(body)).hexdigest()
    return _canonical(body | {"sha256": checksum})


def _is_manifest_of(content: bytes, step: Any, files: Mapping[str, Any]) -> bool:
    try:
        return content == _manifest(step, files)
    except RecursionError:
        # Nested deeper than what was ever written.
        return False


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, indent=1).encode()


def read_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: if it is missing or damaged, or of another checkpoint or version.
    """
    manifest = path / MANIFEST
    try:
        content = manifest.read_bytes()
        values: Any = json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(manifest, f"cannot be read: {error}") from error
    if isinstance(values, dict) and values.get("format") in _FORMER_FORMATS:
        raise CheckpointError(
            f"{manifest} is of format {values['format']}, which this version does not read: it reads {CHECKPOINT_FORMAT}. Use "
            "the version of longspan that wrote it, or start a new run"
        )
    if not isinstance(values, dict) or values.get("format") != CHECKPOINT_FORMAT:
        raise damaged(manifest, f"is no manifest of format {CHECKPOINT_FORMAT}")
    files = values.get("files")
    if not isinstance(files, dict) or not _is_manifest_of(content, values.get("step"), files):
        raise damaged(manifest, "has changed since it was written: its checksum is another")
    for name, expected in files.items():
        kinds = {key: type(value) for key, value in expected.items()} if isinstance(expected, dict) else {}
        if kinds != {"bytes": int, "sha256": str}:
            raise damaged(manifest, f"does not give the bytes and the SHA-256 of {name!r}")
    if path.name != folder_name(values["step"]):
        raise damaged(manifest, f"is that of step {values['step']!r}")
    outside = [name for name in files if Path(name).name != name or name in ("", "..") or "\0" in name]
    if outside:
        raise damaged(manifest, f"names a file outside its folder: {outside[0]!r}")
    return Manifest(values["step"], files)


def all_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints below `folder`, damaged ones as well, oldest first. Raises CheckpointError if it cannot be read."""
    try:
        paths = list(folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error}. Give access to it") from error
    matches = [(_NAME.fullmatch(path.name), path) for path in paths]
    return [path for _, path in sorted((int(match.group(1)), path) for match, path in matches if match)]


def _is_complete(path: Path) -> bool:
    try:
        files = json.loads((path / MANIFEST).read_bytes())["files"]
        return all((path / name).is_file() for name in files)
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return False


def damaged(path: Path, what: str) -> CheckpointError:
    """The error for a file of a checkpoint that is not what was written."""
    return CheckpointError(
        f"{path} {what}. Remove the folder {path.parent.name} to go on from the checkpoint before it, or give "
        "--checkpoint.allow_older True, or restore the file"
    )


def write_synced(path: Path, content: bytes) -> WrittenFile:
    """Write a new file and flush it to disk; return what a manifest says of it."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
