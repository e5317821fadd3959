"""Tensors of a checkpoint, into those of any ranks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, LoadPlan, LoadPlanner, Metadata, StorageReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.futures import Future

from longspan.train.checkpoint import MANIFEST, WrittenFile, damaged, verify_file
from longspan.train.storage.index import SavedTensor


def read_tensors(
    path: Path, files: Mapping[str, WrittenFile], index: Mapping[str, SavedTensor], targets: Mapping[str, Tensor]
) -> None:
    """Read a checkpoint's tensors into `targets`, in place: of each, whole or divided over any ranks, what this rank has.

    The files that are read are verified first.

    Raises:
        CheckpointError: for a target that the checkpoint lacks or has of another shape, and for a file that is missing or damaged;
            the message names it.
    """
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    reader = TensorFilesReader(path, files, index)
    for name, target in targets.items():
        if name not in index or index[name].shape != tuple(target.shape):
            there = index[name].shape if name in index else "missing"
            raise damaged(
                path / MANIFEST, f"has not what is read: {name} is {there} there, and {tuple(target.shape)} here"
            )
    planner.set_up_planner(dict(targets), reader.read_metadata(), is_coordinator=True)
    reader.read_data(planner.create_local_plan(), planner).wait()


class TensorFilesReader(StorageReader):
    """DCP's storage of a checkpoint of ours, whichever ranks wrote it; reads no file that is not verified."""

    def __init__(self, path: Path, files: Mapping[str, WrittenFile], index: Mapping[str, SavedTensor]) -> None:
        self._path = path
        self._files = files
        self._index = index

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What DCP plans by: shapes, dtypes, chunks."""
        return Metadata({name: _metadata(tensor) for name, tensor in self._index.items()})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the index was read."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Verify the files that a plan reads, and read it."""
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self._file_of(item.storage_index), []).append(item)
        for name in by_file:
            verify_file(self._path, name, self._files)
        for name, items in by_file.items():
            self._read_file(name, items, planner)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether there may be a checkpoint: in folders alone."""
        return Path(checkpoint_id).is_dir()

    def _file_of(self, place: MetadataIndex) -> str:
        offsets = tuple(place.offset or ())
        return next(chunk.file for chunk in self._index[place.fqn].chunks if chunk.offsets == offsets)

    @torch.no_grad()
    def _read_file(self, name: str, items: list[ReadItem], planner: LoadPlanner) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._path / name, framework="pt") as file:
                for item in items:
                    key = item.storage_index.fqn
                    part = tuple(
                        slice(start, start + length)
                        for start, length in zip(item.storage_offsets, item.lengths, strict=True)
                    )
                    saved = file.get_slice(key)[part] if part else file.get_tensor(key)
                    target = planner.resolve_tensor(item)
                    if target.shape != saved.shape:
                        raise ValueError(f"{key} is {tuple(saved.shape)}, not {tuple(target.shape)}")
                    target.copy_(saved)
                    planner.commit_tensor(item, target)
        except (SafetensorError, ValueError, KeyError, RuntimeError, IndexError, TypeError, OSError) as error:
            raise damaged(self._path / name, f"does not hold the tensors of its index: {error}") from error


def _metadata(tensor: SavedTensor) -> TensorStorageMetadata:
    chunks = [ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)) for chunk in tensor.chunks]
    return TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), torch.Size(tensor.shape), chunks)
