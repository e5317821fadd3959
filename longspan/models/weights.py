"""Weights on disk: tensors of a safetensors file, or of a folder as Hugging Face has them; and whether a model's are all there.

Pickles are refused, wherever they are met: reading one can run any code.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longspan.errors import CheckpointError

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""What Hugging Face calls the weights of a folder, and where several files share them, their index."""

_PICKLES = ("pytorch_model*.bin", "pytorch_model.bin.index.json", "*.pt", "*.pth", "*.ckpt", "consolidated*.pth")
_PICKLE_STARTS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_CONVERT = (
    "Convert it where you trust it: safetensors.torch.save_file({name: x.clone() for name, x in torch.load('FILE', "
    "weights_only=True).items()}, 'model.safetensors', {'format': 'pt'})"
)


class Weights:
    """Tensors by name, each read when it is asked for.

    Attributes:
        path: the file or folder. shapes: of each tensor. metadata: what a single file says beside its tensors; empty for several.
    """

    def __init__(self, path: Path, files: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
        self.path = path
        self.metadata = dict(metadata)
        self._files = dict(files)
        self.shapes: dict[str, tuple[int, ...]] = {
            name: tuple(file.get_slice(name).get_shape()) for name, file in self._files.items()
        }

    def read(self, name: str) -> Tensor:
        """A tensor, in the dtype that it was written in.

        Raises:
            CheckpointError: where the file cannot be read any more.
        """
        from safetensors import SafetensorError

        try:
            tensor: Tensor = self._files[name].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise unreadable(self.path, error) from error
        return tensor


@contextlib.contextmanager
def open_weights(path: Path) -> Iterator[Weights]:
    """The weights of a safetensors file, or of a folder that holds ``model.safetensors`` or its shards and their index.

    Raises:
        CheckpointError: for what is not there, damaged, no safetensors, or a pickle; the message names the file.
    """
    from safetensors import SafetensorError, safe_open

    names: dict[Path, set[str] | None] = {path: None}
    if path.is_dir():
        refuse_pickled_folder(path)
        names = _files_of(path)
    with contextlib.ExitStack() as stack:
        files: dict[str, Any] = {}
        metadata: Mapping[str, str] = {}
        for file, expected in names.items():
            try:
                opened = stack.enter_context(safe_open(file, "pt"))
                found = set(opened.keys())
                metadata = opened.metadata() or {} if len(names) == 1 else {}
            except (SafetensorError, OSError) as error:
                refuse_pickle(file)
                raise unreadable(file, error) from error
            _check_shard(file, found, expected)
            files.update(dict.fromkeys(found, opened))
        yield Weights(path, files, metadata)


def unreadable(path: Path, error: Exception) -> CheckpointError:
    """The error for what cannot be read as safetensors."""
    return CheckpointError(f"{path} cannot be read as safetensors: {error}. Give a whole file of weights")


def refuse_pickle(path: Path) -> None:
    """Raise CheckpointError for what begins as `torch.save` writes it: a pickle in a ZIP archive, or by itself."""
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError:
        return
    if start == b"PK\x03\x04" or start[:2] in _PICKLE_STARTS:
        raise CheckpointError(
            f"{path} is a pickle, as torch.save writes it: reading one can run any code, so none is read here. {_CONVERT}"
        )


def refuse_pickled_folder(path: Any, subfolder: str = "") -> None:
    """Raise CheckpointError for a folder whose weights are pickles alone; what is no folder is let pass."""
    folder = Path(path) / subfolder
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickles = sorted({found.name for pattern in _PICKLES for found in folder.glob(pattern)})
    if pickles:
        raise CheckpointError(
            f"{folder} has weights in {', '.join(pickles)} alone, which are pickles: reading one can run any code, so none is read "
            f"here. {_CONVERT}"
        )


def as_float32(name: str, tensor: Tensor) -> Tensor:
    """A tensor in the dtype that runs keep weights in, the same numbers.

    Raises:
        CheckpointError: for a dtype whose numbers float32 has not all.
    """
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise CheckpointError(
            f"{name} is {tensor.dtype}, and a run keeps weights in float32, which has not all of its numbers. Convert it yourself, "
            "model.float().save_pretrained(FOLDER), if that is what you want"
        )
    return tensor.float()


def check_shapes(
    what: str, found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], remedy: str
) -> None:
    """Raise CheckpointError, with every difference, unless weights have the names and shapes that a model wants.

    what: names the weights.
    """
    lines = listed_differences(found, wanted)
    if lines:
        raise CheckpointError(
            f"{what} are not those of this model, {len(lines)} differ:\n  " + "\n  ".join(lines) + f"\n{remedy}"
        )


def listed_differences(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> list[str]:
    """A line for each tensor that is missing, of another shape, or of no model of this kind."""
    odd = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
    return [f"{name}: {found.get(name, 'missing')} there, {wanted.get(name, 'missing')} here" for name in odd]


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter of a model by its name; a matrix that is used twice once."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _files_of(folder: Path) -> dict[Path, set[str] | None]:
    """The files of a folder's weights, and the names of the tensors that each must have, where an index says so."""
    index = folder / INDEX
    if (folder / WHOLE).is_file():
        return {folder / WHOLE: None}
    if not index.is_file():
        raise CheckpointError(
            f"{folder} has no weights: neither {WHOLE} nor {INDEX}. Give a folder that save_pretrained has written"
        )
    try:
        placed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files: dict[Path, set[str] | None] = {}
        for name, file in placed.items():
            names = files.setdefault(folder / Path(file).name, set())
            assert names is not None
            names.add(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{index} is no index of weights: {type(error).__name__}: {error}. Copy the folder again"
        ) from error
    gone = sorted(file.name for file in files if not file.is_file())
    if gone:
        raise CheckpointError(f"{folder} lacks {', '.join(gone)}, which {INDEX} names. Copy the folder again")
    return files


def _check_shard(file: Path, found: set[str], expected: set[str] | None) -> None:
    if expected is not None and found != expected:
        odd = sorted(found ^ expected)
        raise CheckpointError(
            f"{file} does not hold what {INDEX} says of it; {len(odd)} differ: {', '.join(odd)}. Copy the folder again"
        )
