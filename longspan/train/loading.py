"""A checkpoint that is read: its state and its tensors, each verified before it is used."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from longspan.errors import CheckpointError, ConfigError
from longspan.train.checkpoint import WrittenFile, damaged, read_manifest, read_verified
from longspan.train.config import Config, from_mapping

if TYPE_CHECKING:
    from longspan.train.storage import SavedTensor

STATE = "state.json"
OTHER_VERSION = "Use the version of longspan that wrote them, or start a new run"

Value = TypeVar("Value")
Measured = TypeVar("Measured")


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint on disk, whose manifest, state and index were verified; its tensors are when they are read."""

    path: Path
    step: int
    state: dict[str, Any]
    files: dict[str, WrittenFile]
    index: dict[str, SavedTensor]
    """Its tensors by ``kind/name``."""

    def value(self, name: str, kind: type[Value]) -> Value:
        """A value of the state.

        Raises:
            CheckpointError: where it is missing, or of another type.
        """
        value = self.state.get(name)
        if not isinstance(value, kind):
            raise CheckpointError(
                f"the checkpoint of step {self.step} has {value!r} for {name}; this version expects a value of type "
                f"{kind.__name__}. {OTHER_VERSION}"
            )
        return value

    def config(self, folder: Path, or_else: str = "") -> Config:
        """What the run in `folder` was told when it was saved; or_else: what its reader may do, too.

        Raises:
            CheckpointError: for a config that this version does not know.
        """
        try:
            return from_mapping(self.value("config", dict))
        except ConfigError as error:
            raise CheckpointError(
                f"the checkpoint of step {self.step} in {folder} has a config that this version does not know: {error}. "
                f"Use the version of longspan that wrote it{or_else}"
            ) from error

    def measured(self, name: str, read: Callable[[Any], Measured], what: str) -> Measured | None:
        """What was measured before, of the state's value `name`, by `read` of its JSON; None where the checkpoint has none.

        what: its name in words. It is measured anew by ``parallel.NAME remeasured``.

        Raises:
            CheckpointError: for a value that `read` does not take.
        """
        record = self.state.get(name)
        if record is None:
            return None
        try:
            return read(record)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the checkpoint of step {self.step} has no {what} that this version knows: {type(error).__name__}: {error}. "
                f"Measure anew (parallel.{name} remeasured), or start a new run"
            ) from error

    def shapes(self, kind: str) -> dict[str, tuple[int, ...]]:
        """The whole shapes of the tensors of a kind, by name."""
        prefix = f"{kind}/"
        return {name.removeprefix(prefix): t.shape for name, t in self.index.items() if name.startswith(prefix)}

    def read(self, kind: str, targets: Mapping[str, Tensor]) -> None:
        """Read tensors of a kind into `targets`, in place: of each, whole or divided over ranks, what this rank has.

        Raises:
            CheckpointError: for what the checkpoint lacks, and for a file that is missing or damaged; the message names it.
        """
        from longspan.train.storage import read_tensors

        read_tensors(self.path, self.files, self.index, {f"{kind}/{name}": t for name, t in targets.items()})

    def whole(self, kind: str) -> dict[str, Tensor]:
        """All tensors of a kind, whole, by name; raises as `read`."""
        prefix = f"{kind}/"
        tensors = {
            name.removeprefix(prefix): torch.empty(saved.shape, dtype=saved.dtype)
            for name, saved in self.index.items()
            if name.startswith(prefix)
        }
        self.read(kind, tensors)
        return tensors


def open_checkpoint(path: Path) -> SavedCheckpoint:
    """A checkpoint, without its tensors.

    Raises:
        CheckpointError: if its manifest, state or index is missing or damaged; the message names the file.
    """
    from longspan.train.storage import read_index

    manifest = read_manifest(path)
    content = read_verified(path, STATE, manifest.files)
    try:
        state: Any = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise damaged(path / STATE, f"is not JSON: {error}") from error
    if not isinstance(state, dict):
        raise damaged(path / STATE, "is not a JSON object")
    return SavedCheckpoint(path, manifest.step, state, manifest.files, read_index(path, manifest.files))
