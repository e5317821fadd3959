"""All sections of a config, its values by ``section.key``, and how two configs differ."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from longspan.train.config.data import DataConfig, RecallConfig
from longspan.train.config.model import ModelConfig
from longspan.train.config.parallel import ParallelConfig
from longspan.train.config.run import (
    CheckpointConfig,
    OptimConfig,
    RunConfig,
    SampleConfig,
    TrainConfig,
    ValidationConfig,
)

_FIXED_SECTIONS = ("data", "recall", "model")
_FIXED_KEYS = ("train.seed", "train.seq_len", "train.batch_tokens")


@dataclass(frozen=True)
class Config:
    """Everything that a training run is told."""

    data: DataConfig = field(default_factory=DataConfig)
    recall: RecallConfig = field(default_factory=RecallConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def batch_sequences(self) -> int:
        """Sequences of a global batch."""
        return self.train.batch_tokens // self.train.seq_len


def known_keys() -> list[str]:
    """Every key as ``section.key``."""
    return list(flatten(Config()))


def flatten(config: Config) -> dict[str, Any]:
    """The values by ``section.key``."""
    values = {
        f"{section.name}.{entry.name}": getattr(getattr(config, section.name), entry.name)
        for section in dataclasses.fields(config)
        for entry in dataclasses.fields(getattr(config, section.name))
    }
    if values["model.num_kv_heads"] is None:
        # A file has no None, and leaving the key out is another number.
        values["model.num_kv_heads"] = values["model.num_heads"]
    return values


def section_names() -> list[str]:
    """The sections, in their order."""
    return [section.name for section in dataclasses.fields(Config)]


def differences(old: Config, new: Config) -> list[str]:
    """One line for each key whose values differ."""
    before, after = flatten(old), flatten(new)
    return [f"{key}: {before[key]!r} -> {after[key]!r}" for key in before if before[key] != after[key]]


def changes_what_is_trained(old: Config, new: Config) -> list[str]:
    """One line for each difference that a resumed run cannot have: of the model, the data, or their order."""
    return [
        line
        for line in differences(old, new)
        if line.split(":")[0] not in ("data.folder", "data.prepared", "data.verify")
        and (line.split(".")[0] in _FIXED_SECTIONS or line.split(":")[0] in _FIXED_KEYS)
    ]
