"""Whole checkpoints in one process: what the tests write and read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longspan.launch import Place
from longspan.train.checkpoint import folder_name
from longspan.train.loading import open_checkpoint
from longspan.train.ranks import Ranks
from longspan.train.saving import CheckpointSaver


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by kind and name, and JSON."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int, asynchronous: bool = False) -> Path:
    """Write it as one rank; the path of what is complete then."""
    saver = CheckpointSaver(folder, Ranks(Place(), torch.device("cpu")), keep, asynchronous, 30.0)
    tensors = {f"{kind}/{name}": x for kind, named in checkpoint.tensors.items() for name, x in named.items()}
    saver.start(checkpoint.step, tensors, checkpoint.state)
    saver.finish()
    return folder / folder_name(checkpoint.step)


def load_checkpoint(path: Path) -> Checkpoint:
    """All of it, verified."""
    saved = open_checkpoint(path)
    kinds = dict.fromkeys(name.split("/")[0] for name in saved.index)
    return Checkpoint(saved.step, {kind: saved.whole(kind) for kind in kinds}, saved.state)
