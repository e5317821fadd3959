"""The file of weights that a run leaves: safetensors, with what the model is made of in its metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from longspan.errors import CheckpointError
from longspan.models import LinearLlama3Config
from longspan.train.run_folder import replacing

_METADATA = "LinearLlama3Config"


def write_weights(path: Path, weights: Mapping[str, Tensor], config: LinearLlama3Config) -> None:
    """Write whole weights by name; the same weights of the same model are the same bytes.

    Raises:
        ConfigError: where the disk refuses.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    whole = {name: weight.cpu().contiguous() for name, weight in weights.items()}
    # One entry: safetensors writes several in an order that changes from run to run.
    metadata = {_METADATA: json.dumps(config.to_dict())}
    with replacing(path) as unfinished:
        try:
            save_file(whole, unfinished, metadata=metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from error


def config_of_file(path: Path, metadata: Mapping[str, str], otherwise: LinearLlama3Config) -> LinearLlama3Config:
    """What a file says of its model, or else `otherwise`.

    Raises:
        CheckpointError: for a model that this version does not know.
    """
    if _METADATA not in metadata:
        return otherwise
    try:
        values = json.loads(metadata[_METADATA])
        return LinearLlama3Config(**values)
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} does not describe a model that this version knows: {error}. Use the version of longspan that wrote it"
        ) from error
