"""What a training run is told: dataclasses, one a section; a TOML file; ``--section.key value`` on the command line.

Later sources override earlier ones: defaults; the TOML file (or, on resume, the run's own ``config.toml``); the command
line.
"""

from longspan.train.config.data import DataConfig, RecallConfig
from longspan.train.config.keys import check_arguments, take_preset, unknown_key
from longspan.train.config.model import PRESET, ModelConfig
from longspan.train.config.parallel import ParallelConfig
from longspan.train.config.run import (
    CheckpointConfig,
    OptimConfig,
    RunConfig,
    SampleConfig,
    TrainConfig,
    ValidationConfig,
)
from longspan.train.config.toml import from_mapping, read_toml, to_mapping, to_toml
from longspan.train.config.whole import (
    Config,
    changes_what_is_trained,
    differences,
    flatten,
    known_keys,
)

__all__ = [
    "PRESET",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "RecallConfig",
    "RunConfig",
    "SampleConfig",
    "TrainConfig",
    "ValidationConfig",
    "changes_what_is_trained",
    "check_arguments",
    "differences",
    "flatten",
    "from_mapping",
    "known_keys",
    "read_toml",
    "take_preset",
    "to_mapping",
    "to_toml",
    "unknown_key",
]
