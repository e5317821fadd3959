"""The run folder: everything a run writes, and nothing of another run."""

from __future__ import annotations

import time
from pathlib import Path

from longspan.errors import CheckpointError, ConfigError

DEFAULT_PARENT = Path("runs")


class RunFolder:
    """Paths inside a run's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.toml"
        self.data = path / "data"
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.events = path / "tensorboard"
        self.traces = path / "traces"
        self.weights = path / "weights.safetensors"
        self.plot = path / "loss.png"
        self.summary_json = path / "summary.json"
        self.summary_text = path / "summary.md"


def create_run_folder(wanted: str | None) -> RunFolder:
    """Make a new run folder; None is ``runs/`` and the time.

    Raises:
        ConfigError: if there is a run, or anything else, in that folder already, or it cannot be made.
    """
    if wanted is None:
        return _create_by_time()
    path = Path(wanted)
    if path.is_dir() and any(path.iterdir()):
        raise ConfigError(
            f"run.dir {wanted!r} is not empty, and a run never overwrites another one. Go on with that run by "
            f"--resume {wanted}, or give another folder"
        )
    _make(path)
    return RunFolder(path)


def find_run_to_resume(wanted: str | None) -> RunFolder:
    """The run folder `wanted`, or the run in ``runs/`` that was started last.

    Raises:
        CheckpointError: if there is no run.
    """
    if wanted is not None:
        folder = RunFolder(Path(wanted))
        if not folder.config.is_file():
            raise CheckpointError(
                f"{wanted!r} is no run folder: it has no config.toml. Give the folder of a run to --resume"
            )
        return folder
    configs = sorted(DEFAULT_PARENT.glob("*/config.toml"), key=lambda path: path.stat().st_mtime)
    if not configs:
        raise CheckpointError(f"there is no run in {DEFAULT_PARENT}/ to go on with. Give its folder: --resume FOLDER")
    return RunFolder(configs[-1].parent)


def _create_by_time() -> RunFolder:
    name = time.strftime("%Y-%m-%d_%H-%M-%S")
    for attempt in range(1, 1000):
        path = DEFAULT_PARENT / (name if attempt == 1 else f"{name}-{attempt}")
        if not path.exists():
            _make(path)
            return RunFolder(path)
    raise ConfigError(f"{DEFAULT_PARENT / name} and its neighbours exist. Give a run.dir")


def _make(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run.dir {str(path)!r} cannot be made: {error}. Give another folder") from error
