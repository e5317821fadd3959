"""Checkpoints that are whole or absent.

A checkpoint is a folder ``step-00000100`` of safetensors and JSON files and a manifest with the SHA-256 of each. It is
written under a temporary name, flushed to disk, and renamed: a crash at any instant leaves the complete ones as they
were. The manifest is canonical JSON with a checksum of itself, so that no byte of a checkpoint can change unnoticed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from longspan.errors import CheckpointError
from longspan.faults import reached

CHECKPOINT_FORMAT = "longspan-checkpoint-1"
MANIFEST = "manifest.json"
_TEMPORARY = ".writing-"
_DISCARDED = ".removing-"
_NAME = re.compile(r"step-([0-9]{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds: tensors by file and name, and JSON."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write `checkpoint` below `folder`, then remove all but the newest `keep` complete ones; return its path.

    Raises:
        CheckpointError: if it cannot be written. What was there before stays as it is.
    """
    from safetensors.torch import save

    final = folder / _folder_name(checkpoint.step)
    temporary = folder / f"{_TEMPORARY}{final.name}"
    if _is_complete(final):
        # The run was resumed from it and has made no step since.
        return final
    try:
        reached("checkpoint.begun", checkpoint.step)
        folder.mkdir(parents=True, exist_ok=True)
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir()
        contents = {
            f"{name}.safetensors": save({key: value.detach().cpu().contiguous() for key, value in tensors.items()})
            for name, tensors in checkpoint.tensors.items()
        }
        contents["state.json"] = json.dumps(checkpoint.state, indent=1).encode()
        for name, content in contents.items():
            reached("checkpoint.file", checkpoint.step)
            _write_synced(temporary / name, content)
        files = {name: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for name, c in contents.items()}
        _write_synced(temporary / MANIFEST, _manifest(checkpoint.step, files))
        _sync_folder(temporary)
        reached("checkpoint.written", checkpoint.step)
        if final.exists():
            # It lacks a file, or it would have been found above.
            shutil.rmtree(final)
        temporary.rename(final)
        _sync_folder(folder)
        reached("checkpoint.renamed", checkpoint.step)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"the checkpoint of step {checkpoint.step} could not be written to {folder}: {error}. Earlier "
            "checkpoints are untouched: make room or give access, and go on with --resume"
        ) from error
    for old in complete_checkpoints(folder)[:-keep]:
        # Under its own name it would look damaged to a resume if this were cut off.
        with contextlib.suppress(OSError):
            discarded = old.rename(folder / f"{_DISCARDED}{old.name}")
            reached("checkpoint.removing", checkpoint.step)
            shutil.rmtree(discarded, ignore_errors=True)
    return final


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints below `folder`, oldest first: those that have a manifest and every file of it."""
    return [path for path in _by_step(folder) if _is_complete(path)]


def newest_checkpoint(folder: Path) -> Path:
    """The newest checkpoint below `folder`; what a crash left half-written does not count, what was damaged later does.

    Raises:
        CheckpointError: if there is none.
    """
    found = _by_step(folder)
    if not found:
        raise CheckpointError(
            f"there is no complete checkpoint in {folder}: the run ended before its first. Start a new run"
        )
    return found[-1]


def remove_leftovers(folder: Path) -> None:
    """Remove what a crash left half-written or half-removed. Only before a run writes its own."""
    for path in folder.iterdir() if folder.is_dir() else []:
        if path.name.startswith((_TEMPORARY, _DISCARDED)):
            shutil.rmtree(path, ignore_errors=True)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint after checking every byte of it.

    Raises:
        CheckpointError: if a file is missing, damaged or not part of it; the message names the file.
    """
    manifest = _read_manifest(path)
    contents = {}
    for name, expected in manifest["files"].items():
        try:
            content = (path / name).read_bytes()
        except OSError as error:
            raise _damaged(path / name, f"cannot be read: {error}") from error
        if len(content) != expected["bytes"]:
            raise _damaged(path / name, f"has {len(content)} bytes; {expected['bytes']} were written")
        if hashlib.sha256(content).hexdigest() != expected["sha256"]:
            raise _damaged(path / name, "has changed since it was written: its SHA-256 is another")
        contents[name] = content
    state = _read_state(path, contents)
    tensors = {
        name.removesuffix(".safetensors"): _read_tensors(path / name, content)
        for name, content in contents.items()
        if name.endswith(".safetensors")
    }
    return Checkpoint(manifest["step"], tensors, state)


def _read_state(path: Path, contents: dict[str, bytes]) -> dict[str, Any]:
    name = "state.json"
    if name not in contents:
        raise _damaged(path / name, "is not part of the checkpoint")
    try:
        state: Any = json.loads(contents[name])
    except (ValueError, RecursionError) as error:
        raise _damaged(path / name, f"is not JSON: {error}") from error
    if not isinstance(state, dict):
        raise _damaged(path / name, "is not a JSON object")
    return state


def _read_tensors(path: Path, content: bytes) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(content)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise _damaged(path, f"holds no tensors: {error}") from error


def _folder_name(step: Any) -> str:
    return f"step-{step:08d}" if type(step) is int else ""


def _manifest(step: Any, files: dict[str, dict[str, Any]]) -> bytes:
    body = {"files": files, "format": CHECKPOINT_FORMAT, "step": step}
    checksum = hashlib.sha256(_canonical(body)).hexdigest()
    return _canonical(body | {"sha256": checksum})


def _is_manifest_of(content: bytes, step: Any, files: dict[str, dict[str, Any]]) -> bool:
    try:
        return content == _manifest(step, files)
    except RecursionError:
        # Nested deeper than what was ever written.
        return False


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, indent=1).encode()


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest = path / MANIFEST
    try:
        content = manifest.read_bytes()
        values: Any = json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(manifest, f"cannot be read: {error}") from error
    if not isinstance(values, dict) or values.get("format") != CHECKPOINT_FORMAT:
        raise _damaged(manifest, f"is no manifest of format {CHECKPOINT_FORMAT}")
    files = values.get("files")
    if not isinstance(files, dict) or not _is_manifest_of(content, values.get("step"), files):
        raise _damaged(manifest, "has changed since it was written: its checksum is another")
    for name, expected in files.items():
        kinds = {key: type(value) for key, value in expected.items()} if isinstance(expected, dict) else {}
        if kinds != {"bytes": int, "sha256": str}:
            raise _damaged(manifest, f"does not give the bytes and the SHA-256 of {name!r}")
    if path.name != _folder_name(values["step"]):
        raise _damaged(manifest, f"is that of step {values['step']!r}")
    outside = [name for name in files if Path(name).name != name or name in ("", "..") or "\0" in name]
    if outside:
        raise _damaged(manifest, f"names a file outside its folder: {outside[0]!r}")
    return values


def _by_step(folder: Path) -> list[Path]:
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


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path} {what}. Remove the folder {path.parent.name} to go on from the checkpoint before it, or restore the "
        "file"
    )


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
