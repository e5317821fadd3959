"""A model that was trained, out of its run folder: weights, tokenizer, and what it was trained for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from longspan.data.files import digest
from longspan.data.prepared import MANIFEST, open_tokenizer_of
from longspan.data.tokenizer import END_OF_DOCUMENT, Tokenizer, load_tokenizer
from longspan.errors import CheckpointError, ConfigError, DataError
from longspan.models import LinearLlama3, LinearLlama3Config
from longspan.models.weights import check_shapes, open_weights, shapes_of
from longspan.parallel.sharded import copy_whole
from longspan.train.checkpoint import all_checkpoints, complete_checkpoints, folder_name
from longspan.train.config import Config, read_toml
from longspan.train.data import folder_of_data
from longspan.train.loading import SavedCheckpoint, open_checkpoint
from longspan.train.run_folder import RunFolder
from longspan.train.weights_file import config_of_file

NEWEST, WEIGHTS = "newest", "weights"
"""Which weights: those of the newest complete checkpoint, or else the weights file; and the weights file."""

_OTHER = "Take weights that belong to this run, or the run that they belong to"


@dataclass(frozen=True)
class Trained:
    """A trained model for one process, on the CPU, float32.

    text_tokenizer: None where its tokens are no text. config: of its run. source: where the weights are from, in words.
    """

    model: LinearLlama3
    text_tokenizer: Tokenizer | None
    config: Config
    source: str

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of its text.

        Raises:
            ConfigError: where it was not trained on text.
        """
        if self.text_tokenizer is None:
            raise ConfigError(
                f"{self.source} was trained with data.task {self.config.data.task!r}, whose tokens are no text. Give a run that "
                "was trained on text, or ask for what it was trained for: longspan eval recall"
            )
        return self.text_tokenizer


@dataclass(frozen=True)
class SavedWeights(ABC):
    """Weights of a run on the disk, not read yet.

    run: its folder. config: of the run. shapes: of the tensors.
    """

    run: RunFolder
    config: Config
    shapes: Mapping[str, tuple[int, ...]]

    @property
    @abstractmethod
    def name(self) -> str:
        """What holds them, in words."""

    @property
    @abstractmethod
    def source(self) -> str:
        """What holds them, and where that is, in words."""

    @abstractmethod
    def model_config(self, vocab_size: int) -> LinearLlama3Config:
        """What their model is made of; `vocab_size` where only the run says it."""

    @abstractmethod
    def read(self, targets: Mapping[str, Tensor]) -> None:
        """Read tensors into `targets`, in place: of each, whole or divided over ranks, what this rank has."""

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raise CheckpointError unless they are of as many tokens as the tokenizer has; DataError if they are of another one's."""
        size = self.shapes.get("embedding.weight", (tokenizer.vocab_size,))[0]
        if size != tokenizer.vocab_size:
            raise CheckpointError(
                f"{self.name} has a vocabulary of {size} tokens, and the tokenizer one of {tokenizer.vocab_size}. Give the data "
                "that it was trained on"
            )

    def read_into(self, model: LinearLlama3, remedy: str = _OTHER) -> None:
        """Give a model these weights, all of them; it may be divided over ranks.

        Raises:
            CheckpointError: for tensors that are missing, of another shape, or of no model of this kind, all of them listed.
        """
        check_shapes(self._weights, self.shapes, shapes_of(model), remedy)
        self.read(dict(model.named_parameters()))

    @property
    @abstractmethod
    def _weights(self) -> str:
        """The weights that it holds, in words."""


@dataclass(frozen=True)
class _OfCheckpoint(SavedWeights):
    """Those of a checkpoint."""

    saved: SavedCheckpoint

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        super().check_tokenizer(tokenizer)
        # Another tokenizer may have as many tokens.
        if self.saved.value("data", dict).get("tokenizer") != digest(tokenizer.to_json().encode()):
            raise DataError(
                f"{self.name} was trained with another tokenizer than the one that is there now. Give the data that it was trained "
                "on, or data that was prepared with its tokenizer.json (--data)"
            )

    @property
    def name(self) -> str:
        return f"the checkpoint of step {self.saved.step}"

    @property
    def source(self) -> str:
        return f"{self.name} in {self.run.path}"

    @property
    def _weights(self) -> str:
        return f"the weights of {self.name}"

    def model_config(self, vocab_size: int) -> LinearLlama3Config:
        return self.config.model.build(vocab_size)

    def read(self, targets: Mapping[str, Tensor]) -> None:
        self.saved.read("model", targets)


@dataclass(frozen=True)
class _OfFile(SavedWeights):
    """Those of a safetensors file."""

    path: Path
    metadata: Mapping[str, str]

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def source(self) -> str:
        return self.name

    @property
    def _weights(self) -> str:
        return f"the weights in {self.name}"

    def model_config(self, vocab_size: int) -> LinearLlama3Config:
        return config_of_file(self.path, self.metadata, self.config.model.build(vocab_size))

    def read(self, targets: Mapping[str, Tensor]) -> None:
        with open_weights(self.path) as weights, torch.no_grad():
            for name, target in targets.items():
                copy_whole(weights.read(name), target)


def open_saved(path: Path, which: str = NEWEST) -> SavedWeights:
    """The weights of a run, not read yet.

    Args:
        path: the run folder.
        which: ``"newest"``, ``"weights"``, the number of a step that there is a checkpoint of, or the path of a safetensors file.

    Raises:
        ConfigError: for a folder that holds no run.
        CheckpointError: for weights that are not there, damaged or pickled.
    """
    folder = RunFolder(path)
    if not folder.config.is_file():
        raise ConfigError(
            f"{str(path)!r} is no run folder: it has no {folder.config.name}. Give the folder that longspan train has written"
        )
    found = _find(folder, which)
    config = read_toml(folder.config)
    if not found.is_dir():
        with open_weights(found) as weights:
            if weights.shapes and all(name.startswith("model.") for name in weights.shapes):
                raise CheckpointError(
                    f"{found} has weights in the form of Hugging Face, and a run has its own. Make a run folder of the folder "
                    f"that it is in: longspan import {found.parent} --to RUN"
                )
            return _OfFile(folder, config, weights.shapes, found, weights.metadata)
    saved = open_checkpoint(found)
    return _OfCheckpoint(folder, saved.config(folder.path), saved.shapes("model"), saved)


def open_trained(path: Path, which: str = NEWEST, data: Path | None = None) -> Trained:
    """The model of a run.

    Args:
        path, which: as in `open_saved`.
        data: a folder of prepared data, for its tokenizer; None is the run's.

    Raises:
        ConfigError, CheckpointError: as `open_saved`, and for weights that are not of this model and vocabulary.
        DataError: for a tokenizer that is not there, or damaged.
    """
    saved = open_saved(path, which)
    tokenizer = open_tokenizer_of_run(saved.run, saved.config, data)
    vocab_size = saved.config.data.vocab_size
    if tokenizer is not None:
        saved.check_tokenizer(tokenizer)
        vocab_size = tokenizer.vocab_size
    # Layers draw weights when they are made, which are replaced: the caller's random state must not notice.
    with torch.random.fork_rng(devices=[]):
        model = LinearLlama3(saved.model_config(vocab_size))
    saved.read_into(model)
    return Trained(model, tokenizer, saved.config, saved.source)


def open_tokenizer_of_run(folder: RunFolder, config: Config, data: Path | None = None) -> Tokenizer | None:
    """The tokenizer of a run: that of its prepared data, or, where there is none, the run folder's own; None of a run on no text.

    Raises:
        DataError: for one that is not there, or damaged.
        ConfigError: for data of a run that reads none.
    """
    if config.data.task != "text":
        if data is not None:
            raise ConfigError(
                f"{folder.path} was trained with data.task {config.data.task!r}, which reads no data; got data {str(data)!r}. "
                "Leave it out"
            )
        return None
    prepared = folder_of_data(config, folder) if data is None else data
    if data is None and folder.tokenizer.is_file() and not (prepared / MANIFEST).is_file():
        return load_tokenizer(folder.tokenizer, config.data.end_of_document or END_OF_DOCUMENT)
    try:
        return open_tokenizer_of(prepared)
    except DataError as error:
        raise DataError(
            f"the tokenizer of {folder.path} is with its prepared data: {error}. If that is elsewhere, say where (--data)"
        ) from error


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
