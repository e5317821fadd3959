"""A model that was trained, out of its run folder: weights, tokenizer, and what it was trained for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longspan.data.prepared import open_tokenizer_of
from longspan.data.tokenizer import Tokenizer
from longspan.errors import CheckpointError, ConfigError, DataError
from longspan.models import LinearLlama3, LinearLlama3Config
from longspan.train import config as configs
from longspan.train.checkpoint import all_checkpoints, complete_checkpoints, folder_name
from longspan.train.config import Config, read_toml
from longspan.train.data import folder_of_data
from longspan.train.loading import open_checkpoint
from longspan.train.model import check_shapes
from longspan.train.run_folder import RunFolder
from longspan.train.trainer import saved_value

NEWEST, WEIGHTS = "newest", "weights"
"""Which weights: those of the newest complete checkpoint, or else the weights file; and the weights file."""

_METADATA = "LinearLlama3Config"
_OTHER = "Take weights that belong to this run, or the run that they belong to"


@dataclass(frozen=True)
class Trained:
    """A trained model for one process, on the CPU, float32.

    config: of its run. source: where the weights are from, in words.
    """

    model: LinearLlama3
    tokenizer: Tokenizer
    config: Config
    source: str


def open_trained(path: Path, which: str = NEWEST, data: Path | None = None) -> Trained:
    """The model of a run.

    Args:
        path: the run folder.
        which: ``"newest"``, ``"weights"``, the number of a step that there is a checkpoint of, or the path of a safetensors file.
        data: a folder of prepared data, for its tokenizer; None is the run's.

    Raises:
        ConfigError: for a folder that holds no run.
        CheckpointError: for weights that are not there, damaged, pickled, or not of this model and vocabulary.
        DataError: for a tokenizer that is not there, or damaged.
    """
    folder = RunFolder(path)
    if not folder.config.is_file():
        raise ConfigError(
            f"{str(path)!r} is no run folder: it has no {folder.config.name}. Give the folder that longspan train has written"
        )
    found = _find(folder, which)
    config = read_toml(folder.config)
    if found.is_dir():
        return _of_checkpoint(found, folder, data)
    return _of_file(found, folder, config, data)


def _find(folder: RunFolder, which: str) -> Path:
    """The checkpoint or the file that is asked for."""
    if which == NEWEST:
        complete = complete_checkpoints(folder.checkpoints)
        if complete or folder.weights.is_file():
            return complete[-1] if complete else folder.weights
        raise CheckpointError(
            f"{folder.path} has no complete checkpoint, and no {folder.weights.name}: the run ended before its first. Go on with "
            f"it by longspan train --resume {folder.path}"
        )
    if which == WEIGHTS:
        if folder.weights.is_file():
            return folder.weights
        raise CheckpointError(
            f"{folder.path} has no {folder.weights.name}, which is written at a run's end. Take its newest checkpoint ({NEWEST})"
        )
    if which.isascii() and which.isdigit():
        found = folder.checkpoints / folder_name(int(which))
        if found.is_dir():
            return found
        there = ", ".join(path.name for path in all_checkpoints(folder.checkpoints)) or "none"
        raise CheckpointError(f"{folder.path} has no checkpoint of step {int(which)}. Those that it has: {there}")
    if Path(which).is_file():
        return Path(which)
    raise CheckpointError(
        f"weights {which!r} are neither {NEWEST!r}, {WEIGHTS!r}, the number of a step, nor a file. Give one of these"
    )


def _of_checkpoint(path: Path, folder: RunFolder, data: Path | None) -> Trained:
    saved = open_checkpoint(path)
    what = f"the checkpoint of step {saved.step}"
    try:
        config = configs.from_mapping(saved_value(saved, "config", dict))
    except ConfigError as error:
        raise CheckpointError(
            f"{what} in {folder.path} has a config that this version does not know: {error}. Use the version of longspan that "
            "wrote it"
        ) from error
    tokenizer = _tokenizer(config, folder, data)
    shapes = saved.shapes("model")
    _check_vocabulary(what, shapes, tokenizer)
    model = _model(config.model.build(tokenizer.vocab_size))
    parameters = dict(model.named_parameters())
    check_shapes(f"the weights of {what}", shapes, _shapes(parameters), _OTHER)
    saved.read("model", parameters)
    return Trained(model, tokenizer, config, f"{what} in {folder.path}")


def _of_file(path: Path, folder: RunFolder, config: Config, data: Path | None) -> Trained:
    from safetensors import SafetensorError, safe_open

    tokenizer = _tokenizer(config, folder, data)
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
            _check_vocabulary(str(path), shapes, tokenizer)
            model = _model(_config_of_file(path, file.metadata(), config, tokenizer.vocab_size))
            parameters = dict(model.named_parameters())
            check_shapes(f"the weights in {path}", shapes, _shapes(parameters), _OTHER)
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(file.get_tensor(name))
    except (SafetensorError, OSError) as error:
        _refuse_pickle(path)
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}. Give a whole file of weights") from error
    return Trained(model, tokenizer, config, str(path))


def _refuse_pickle(path: Path) -> None:
    """Raise CheckpointError for what begins as `torch.save` writes it: a pickle in a ZIP archive, or by itself."""
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError:
        return
    if start == b"PK\x03\x04" or (start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")):
        raise CheckpointError(
            f"{path} is a pickle, as torch.save writes it: reading one can run any code, so none is read here. Convert it where "
            "you trust it: safetensors.torch.save_file(torch.load(path, weights_only=True), 'weights.safetensors')"
        )


def _config_of_file(path: Path, metadata: Any, config: Config, vocab_size: int) -> LinearLlama3Config:
    """What the file says of its model, or else the run."""
    if not metadata or _METADATA not in metadata:
        return config.model.build(vocab_size)
    try:
        values = json.loads(metadata[_METADATA])
        return LinearLlama3Config(**values)
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} does not describe a model that this version knows: {error}. Use the version of longspan that wrote it"
        ) from error


def _tokenizer(config: Config, folder: RunFolder, data: Path | None) -> Tokenizer:
    try:
        return open_tokenizer_of(folder_of_data(config, folder) if data is None else data)
    except DataError as error:
        raise DataError(
            f"the tokenizer of {folder.path} is with its prepared data: {error}. If that is elsewhere, say where (--data)"
        ) from error


def _check_vocabulary(what: str, shapes: dict[str, tuple[int, ...]], tokenizer: Tokenizer) -> None:
    size = shapes.get("embedding.weight", (tokenizer.vocab_size,))[0]
    if size != tokenizer.vocab_size:
        raise CheckpointError(
            f"{what} has a vocabulary of {size} tokens, and the tokenizer one of {tokenizer.vocab_size}. Give the data that it was "
            "trained on"
        )


def _model(config: LinearLlama3Config) -> LinearLlama3:
    # Layers draw weights when they are made, which are replaced: the caller's random state must not notice.
    with torch.random.fork_rng(devices=[]):
        return LinearLlama3(config)


def _shapes(parameters: dict[str, torch.nn.Parameter]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in parameters.items()}
