"""Which tensors a checkpoint has, and which files of which ranks hold their chunks."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longspan.train.checkpoint import WrittenFile, damaged, read_verified

DTYPES = {
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
NAMES = {dtype: name for name, dtype in DTYPES.items()}
"""Of dtypes, what safetensors calls them."""


def index_name(rank: int) -> str:
    """The name of a rank's index."""
    return f"index-{rank:05d}.json"


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
    return SavedTensor(DTYPES[entry["dtype"]], shape, (Chunk(entry["file"], offsets, sizes),))


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(size) is int and 0 <= size < 2**48 for size in value):
        raise ValueError(f"{value!r} are no sizes")
    return tuple(value)
