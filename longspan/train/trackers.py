"""Where the numbers of a run go besides ``metrics.jsonl``: TensorBoard, Weights & Biases.

Each is imported when it is first written to.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from longspan.train.config import Config, flatten
from longspan.train.run_folder import RunFolder


class Tracker(ABC):
    """Takes a record at a time, as `longspan.train.metrics.MetricsFile.append` does."""

    @abstractmethod
    def write(self, record: dict[str, Any]) -> None:
        """Take the numbers of a step; None stands for what is not finite."""

    @abstractmethod
    def close(self, failed: bool = False) -> None:
        """Write what has not been written yet. failed: whether the run ends by an error."""


class TensorBoard(Tracker):
    """Event files in a folder, a scalar for each number."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def write(self, record: dict[str, Any]) -> None:
        """See `Tracker`."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # What a resumed run makes again replaces what was there; one at its end only validates again.
            again = record["step"] if "loss" in record else None
            self._writer = SummaryWriter(str(self._folder), purge_step=again)
        for key, value in record.items():
            if key != "step" and value is not None:
                self._writer.add_scalar(key, value, record["step"])

    def close(self, failed: bool = False) -> None:
        """See `Tracker`."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class WeightsAndBiases(Tracker):
    """A run of Weights & Biases, named after the run folder; a run that is gone on with goes on there, too.

    Where it sends the numbers, or that it only writes them (``WANDB_MODE=offline``), its own environment variables say.
    """

    def __init__(self, folder: Path, project: str, config: Config) -> None:
        self._folder = folder
        self._project = project
        self._config = config
        self._run: Any = None

    def write(self, record: dict[str, Any]) -> None:
        """See `Tracker`."""
        if self._run is None:
            import wandb

            self._run = wandb.init(
                project=self._project,
                name=self._folder.resolve().name,
                id=hashlib.sha256(str(self._folder.resolve()).encode()).hexdigest()[:16],
                resume="allow",
                dir=str(self._folder),
                config=flatten(self._config),
            )
            # A validation is a second record of its step.
            self._run.define_metric("*", step_metric="step")
        self._run.log({key: value for key, value in record.items() if value is not None})

    def close(self, failed: bool = False) -> None:
        """See `Tracker`. A run that fails is left open, which shows as crashed: nothing is to wait for a network then."""
        if self._run is not None and not failed:
            self._run.finish()
            self._run = None


def build_trackers(config: Config, folder: RunFolder) -> list[Tracker]:
    """Those that the config asks for."""
    trackers: list[Tracker] = []
    if config.run.tensorboard:
        trackers.append(TensorBoard(folder.events))
    if config.run.wandb:
        trackers.append(WeightsAndBiases(folder.path, config.run.wandb_project, config))
    return trackers
