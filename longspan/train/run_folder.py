"""The run folder: everything a run writes, and nothing of another run."""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from longspan.data.files import locked
from longspan.errors import CheckpointError, ConfigError

DEFAULT_PARENT = Path("runs")
_UNFINISHED = ".writing-"
# A run that was killed a moment ago is ending now.
_SECONDS_TO_END = 10.0


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise ConfigError, naming the file, for what the disk refuses to take."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{path} could not be written: {error}. Make room or give access, and go on with --resume {path.parent}"
        ) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write what takes the place of `path` once it is whole and on the disk: until then, what is there stays.

    Who may read it is as for any other new file, whatever the library that writes it does (safetensors: its owner alone).

    Raises:
        ConfigError: as `writing`.
    """
    # The same ending: libraries go by it.
    unfinished = path.with_name(f"{_UNFINISHED}{path.name}")
    with writing(path):
        try:
            unfinished.unlink(missing_ok=True)
            unfinished.touch()
            mode = unfinished.stat().st_mode
            yield unfinished
            with unfinished.open("rb") as file:
                os.fchmod(file.fileno(), stat.S_IMODE(mode))
                os.fsync(file.fileno())
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Keep other processes of this host from writing into a run's folder, for as long as the block or this process lasts.

    Raises:
        ConfigError: where another process writes into it, and does not end soon; or it cannot be read.
    """
    deadline = time.monotonic() + _SECONDS_TO_END
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(locked(path))
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"another process is writing into {path}: its run still goes on, and two would damage each other's "
                        "checkpoints. Wait until it has ended, or stop it"
                    ) from None
                time.sleep(0.1)
            except OSError as error:
                raise ConfigError(f"run.dir {str(path)!r} cannot be read: {error}. Give another folder") from error
        yield


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
        self.tokenizer = path / "tokenizer.json"
        self.plot = path / "loss.png"
        self.conversion_json = path / "conversion.json"
        self.conversion_text = path / "conversion.md"
        self.summary_json = path / "summary.json"
        self.summary_text = path / "summary.md"


def create_run_folder(wanted: str | None, or_begun: bool = False) -> RunFolder:
    """Make a new run folder; None is ``runs/`` and the time.

    or_begun: whether `wanted` may be the folder of a run that was begun before.

    Raises:
        ConfigError: if there is a run, or anything else, in that folder already, or it cannot be made.
    """
    if wanted is None:
        return _create_by_time()
    path = Path(wanted)
    if or_begun:
        _make(path)
        _check_holds_a_run_alone(path)
        return RunFolder(path)
    if _is_used(path):
        raise ConfigError(
            f"run.dir {wanted!r} is not empty, and a run never overwrites another one. Go on with that run by "
            f"--resume {wanted}, or give another folder"
        )
    _make(path)
    return RunFolder(path)


def _check_holds_a_run_alone(path: Path) -> None:
    """Raise ConfigError for a folder that holds something, and no run: a run that was cut off early has some of its files."""
    folder = RunFolder(path)
    known = {value.name for key, value in vars(folder).items() if key != "path"}
    try:
        names = [entry.name for entry in path.iterdir()]
    except OSError as error:
        raise ConfigError(f"run.dir {str(path)!r} cannot be read: {error}. Give another folder") from error
    odd = sorted(name for name in names if name not in known and not name.startswith(_UNFINISHED))
    if odd and not _is_file(folder.config):
        raise ConfigError(
            f"run.dir {str(path)!r} holds no run to go on with, and it is not empty: it has {odd[0]!r}. Give another folder"
        )


def find_run_to_resume(wanted: str | None) -> RunFolder:
    """The run folder `wanted`, or the run in ``runs/`` that was started last.

    Raises:
        CheckpointError: if there is no run.
    """
    if wanted is not None:
        folder = RunFolder(Path(wanted))
        if not _is_file(folder.config):
            raise CheckpointError(
                f"{wanted!r} is no run folder: it has no config.toml. Give the folder of a run to --resume"
            )
        return folder
    try:
        configs = sorted(DEFAULT_PARENT.glob("*/config.toml"), key=lambda path: path.stat().st_mtime)
    except OSError as error:
        raise CheckpointError(
            f"{DEFAULT_PARENT}/ cannot be searched: {error}. Give a folder: --resume FOLDER"
        ) from error
    if not configs:
        raise CheckpointError(f"there is no run in {DEFAULT_PARENT}/ to go on with. Give its folder: --resume FOLDER")
    return RunFolder(configs[-1].parent)


def _is_used(path: Path) -> bool:
    try:
        return path.is_dir() and any(path.iterdir())
    except OSError as error:
        raise ConfigError(f"run.dir {str(path)!r} cannot be read: {error}. Give another folder") from error


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Give the folder of a run to --resume") from error


def _create_by_time() -> RunFolder:
    name = time.strftime("%Y-%m-%d_%H-%M-%S")
    _make(DEFAULT_PARENT)
    for attempt in range(1, 1000):
        path = DEFAULT_PARENT / (name if attempt == 1 else f"{name}-{attempt}")
        try:
            path.mkdir()
        except FileExistsError:
            # Of a run that begins at the same moment, too: whoever makes it has it.
            continue
        except OSError as error:
            raise _not_made(path, error) from error
        return RunFolder(path)
    raise ConfigError(f"{DEFAULT_PARENT / name} and its neighbours exist. Give a run.dir")


def _make(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_made(path, error) from error


def _not_made(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"run.dir {str(path)!r} cannot be made: {error}. Give another folder")
