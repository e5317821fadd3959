"""Tensors of a checkpoint as files, for torch's distributed checkpoint (DCP): safetensors and JSON, nothing pickled.

DCP's planners say which chunk of which tensor a rank writes, and which chunks make up what a rank reads, whatever the ranks were
that wrote them. DCP's own storage pickles its metadata, and its `save` and `load` pickle plans between ranks: here the writer and
the reader are ours, and planners are asked without them. A file also holds what torch's `HuggingFaceStorageReader` looks for.

    model-00003.safetensors     of rank 3: the tensors whose names begin with "model/"
    index-00003.json            of rank 3: {"model/norm.weight": {"dtype", "shape", "file", "offsets", "sizes"}, ...}
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    LoadPlan,
    LoadPlanner,
    Metadata,
    SavePlan,
    SavePlanner,
    StorageReader,
    StorageWriter,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from longspan.faults import reached
from longspan.parallel.sharded import is_divided, on_this_rank
from longspan.train.checkpoint import MANIFEST, WrittenFile, damaged, read_verified, verify_file, write_synced

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_BLOCK = 1 << 24


def index_name(rank: int) -> str:
    """The name of a rank's index."""
    return f"index-{rank:05d}.json"


def own_share(tensors: Mapping[str, Tensor], rank: int, world_size: int) -> dict[str, Tensor]:
    """The tensors of which this rank writes what it has: of ranks that have the same, one does, and all write about as much.

    Every rank finds it without asking: it follows from the names and the whole shapes, which are the same on all of them.
    """
    written: dict[int, list[int]] = {}
    share = {}
    for name, tensor in sorted(tensors.items(), key=lambda entry: entry[0]):
        copies, copy = _copies(tensor, rank, world_size)
        loads = written.setdefault(copies, [0] * copies)
        writer = loads.index(min(loads))
        loads[writer] += tensor.numel() * tensor.element_size() + 1
        if writer == copy and on_this_rank(tensor).numel() > 0:
            share[name] = tensor
    return share


def _copies(tensor: Any, rank: int, world_size: int) -> tuple[int, int]:
    """How many ranks have the same part of a tensor, and which of them this one is."""
    if not is_divided(tensor):
        return world_size, rank
    copies, copy = 1, 0
    for size, place, placement in zip(
        tensor.device_mesh.shape, tensor.device_mesh.get_coordinate(), tensor.placements, strict=True
    ):
        if placement.is_replicate():
            copies, copy = copies * size, copy * size + place
    return copies, copy


@torch.no_grad()
def staged(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, which an optimizer step does not change."""
    copies = {}
    for name, tensor in tensors.items():
        local = on_this_rank(tensor)
        copy = torch.empty_like(local, device="cpu").copy_(local, non_blocking=True)
        copies[name] = _divided_as(tensor, copy) if is_divided(tensor) else copy
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return copies


def _divided_as(tensor: Any, local: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


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
                "dtype": _NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [start, end],
            }
            self._index[item.index.fqn] = {
                "dtype": _NAMES[tensor.dtype],
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


@dataclass(frozen=True)
class Chunk:
    """Where a part of a tensor stands: in which file, from which place of the whole tensor on, of which shape."""

    file: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class SavedTensor:
    """A tensor of a checkpoint: whole dtype and shape, and the chunks that make it up."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


def read_index(path: Path, files: Mapping[str, WrittenFile]) -> dict[str, SavedTensor]:
    """All tensors of a checkpoint, by name, from the ranks' indices, which are verified.

    Raises:
        CheckpointError: for an index that is damaged, or in which a part of a tensor is missing; the message names the file.
    """
    found: dict[str, SavedTensor] = {}
    for name in files:
        if not name.startswith("index-"):
            continue
        content = read_verified(path, name, files)
        try:
            entries = json.loads(content)
            parsed = {key: _parsed(entry) for key, entry in entries.items()}
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
            raise damaged(path / name, f"is no index of tensors: {error!r}") from error
        for key, tensor in parsed.items():
            if tensor.chunks[0].file not in files:
                raise damaged(
                    path / name, f"names a file that is not part of the checkpoint: {tensor.chunks[0].file!r}"
                )
            before = found.get(key, SavedTensor(tensor.dtype, tensor.shape, ()))
            if (before.dtype, before.shape) != (tensor.dtype, tensor.shape):
                raise damaged(path / name, f"has another dtype or shape of {key} than the index of another rank")
            found[key] = SavedTensor(tensor.dtype, tensor.shape, before.chunks + tensor.chunks)
    for key, tensor in found.items():
        if sum(math.prod(chunk.sizes) for chunk in tensor.chunks) != math.prod(tensor.shape) or len(
            {chunk.offsets for chunk in tensor.chunks}
        ) != len(tensor.chunks):
            raise damaged(path / tensor.chunks[0].file, f"and the other files do not make up {key} once")
    return found


def _parsed(entry: Any) -> SavedTensor:
    shape, offsets, sizes = (_sizes(entry[key]) for key in ("shape", "offsets", "sizes"))
    inside = len(shape) == len(offsets) == len(sizes) and all(
        place + size <= whole for place, size, whole in zip(offsets, sizes, shape, strict=True)
    )
    if not inside or not isinstance(entry["file"], str):
        raise ValueError(f"a chunk of {sizes} from {offsets} on is not inside of {shape}")
    return SavedTensor(_DTYPES[entry["dtype"]], shape, (Chunk(entry["file"], offsets, sizes),))


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(size) is int and 0 <= size < 2**48 for size in value):
        raise ValueError(f"{value!r} are no sizes")
    return tuple(value)


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
