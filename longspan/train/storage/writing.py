"""What a rank has of a checkpoint's tensors, as files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, Metadata, SavePlan, SavePlanner, StorageWriter
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from longspan.faults import reached
from longspan.train.checkpoint import WrittenFile, write_synced
from longspan.train.storage.index import NAMES, index_name

_BLOCK = 1 << 24


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], rank: int, step: int) -> dict[str, WrittenFile]:
    """Write what this rank has of `tensors`, flushed to disk; return what a manifest says of the files.

    Args:
        folder: exists, and has no file of this rank.
        tensors: by ``kind/name``; a file for each kind.
        rank: this rank.
        step: of the checkpoint.

    Raises:
        OSError: for what the disk does not take.
    """
    planner = DefaultSavePlanner(flatten_state_dict=False)
    planner.set_up_planner(dict(tensors), is_coordinator=True)
    writer = TensorFilesWriter(folder, rank, step)
    writer.write_data(planner.create_local_plan(), planner).wait()
    writer.finish(Metadata({}), [])
    return writer.files


class TensorFilesWriter(StorageWriter):
    """DCP's storage of one rank: its files, and an index of them."""

    def __init__(self, folder: Path, rank: int, step: int) -> None:
        self.files: dict[str, WrittenFile] = {}
        self._folder = folder
        self._rank = rank
        self._step = step
        self._index: dict[str, dict[str, Any]] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Forget what was written."""
        self.files, self._index = {}, {}

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the folder is there."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """The plans as they are."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the chunks of a plan, a file for each kind of tensor."""
        by_file: dict[str, list[WriteItem]] = {}
        for item in plan.items:
            assert item.tensor_data is not None
            kind = item.index.fqn.split("/")[0]
            by_file.setdefault(f"{kind}-{self._rank:05d}.safetensors", []).append(item)
        results = [result for name, items in by_file.items() for result in self._write_file(name, items, planner)]
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index of this rank's files; `metadata` is not used, as it may be of all ranks."""
        reached("checkpoint.file", self._step)
        content = json.dumps(self._index, sort_keys=True, indent=1).encode()
        self.files[index_name(self._rank)] = write_synced(self._folder / index_name(self._rank), content)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether a checkpoint may be written there: in folders alone."""
        return Path(checkpoint_id).is_dir()

    def _write_file(self, name: str, items: list[WriteItem], planner: SavePlanner) -> list[WriteResult]:
        """One safetensors file, tensor by tensor: never a second copy of all of them."""
        tensors = [planner.resolve_data(item) for item in items]
        header: dict[str, Any] = {"__metadata__": {"format": "pt", "DCP_SHARDING_INFO": json.dumps(_offsets(items))}}
        end = 0
        for item, tensor in zip(items, tensors, strict=True):
            assert isinstance(tensor, Tensor) and item.tensor_data is not None
            start, end = end, end + tensor.numel() * tensor.element_size()
            header[item.index.fqn] = {
                "dtype": NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [start, end],
            }
            self._index[item.index.fqn] = {
                "dtype": NAMES[tensor.dtype],
                "shape": list(item.tensor_data.size),
                "file": name,
                "offsets": list(item.tensor_data.chunk.offsets),
                "sizes": list(item.tensor_data.chunk.sizes),
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        reached("checkpoint.file", self._step)
        digest = hashlib.sha256()
        with (self._folder / name).open("xb") as file:
            for place, block in enumerate((len(text).to_bytes(8, "little"), text, *tensors)):
                for part in _blocks(block):
                    digest.update(part)
                    file.write(part)
                if place == 2:
                    # A header and a tensor are written.
                    reached("checkpoint.writing", self._step)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        self.files[name] = {"bytes": size, "sha256": digest.hexdigest()}
        return [
            WriteResult(item.index, tensor.numel() * tensor.element_size(), name)
            for item, tensor in zip(items, tensors, strict=True)
            if isinstance(tensor, Tensor)
        ]


def _offsets(items: list[WriteItem]) -> dict[str, Any]:
    chunks = {item.index.fqn: item.tensor_data.chunk for item in items if item.tensor_data is not None}
    return {name: {"saved_offsets": list(chunk.offsets)} for name, chunk in chunks.items()}


def _blocks(content: Any) -> Iterable[memoryview]:
    """The bytes of a tensor on the CPU, or bytes, in blocks."""
    if isinstance(content, Tensor):
        flat = content.detach().cpu().contiguous().reshape(-1)
        content = flat.view(torch.uint8).numpy() if flat.numel() else b""
    view = memoryview(content)
    for start in range(0, len(view), _BLOCK):
        yield view[start : start + _BLOCK]
