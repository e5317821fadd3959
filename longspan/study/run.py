"""Make the trainings of a study, several at a time; what is done is not done again, and what was begun is gone on with."""

from __future__ import annotations

import json
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from longspan.data.files import write_whole
from longspan.data.prepare import prepare_corpus
from longspan.data.recipe import Recipe
from longspan.errors import ConfigError
from longspan.launch import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, failure_of_job, forwarded_signals, start_job
from longspan.study.grid import Cell, Grid
from longspan.study.results import folder_of, read_summary
from longspan.study.size import Size
from longspan.train.config import to_toml
from longspan.train.run_folder import RunFolder, claimed


@dataclass
class _Job:
    """A cell that is being trained."""

    cell: Cell
    process: subprocess.Popen[bytes]
    meeting: Path
    output: BinaryIO
    started: float


class Study:
    """A study in a folder: size.json is its size, data/ the text, cells/ the runs, configs/ and logs/ what they were told and said.

    say: prints a line.

    Raises:
        ConfigError: for a folder of a study of another size, and for a size that no run takes.
    """

    def __init__(
        self, folder: Path, grid: Grid, size: Size, jobs: int, threads: int, say: Callable[[str], None]
    ) -> None:
        self.folder, self.grid, self.size = folder, grid, size
        self._jobs, self._threads, self._say = jobs, threads, say
        for cell in grid.cells:
            self._config(cell)
        check_size(folder, size)
        self._seconds: dict[Cell, float] = {}
        self._failed: list[Cell] = []

    def run(self) -> int:
        """Train what is not done; the exit code.

        Raises:
            ConfigError: where another process works on the same folder, or it cannot be written to.
            DataError: where the text cannot be prepared.
        """
        try:
            for name in ("cells", "configs", "logs"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{self.folder} cannot be written to: {error}. Give another --out") from error
        with claimed(self.folder):
            write_size(self.folder, self.size)
            waiting = self._waiting()
            self._say(f"{len(self.grid.cells)} trainings, {len(self.grid.cells) - len(waiting)} of them done before")
            if any(cell.group.task == "text" for cell in waiting):
                took = prepare_corpus(Recipe.of(self.size.data(), 0), self._data)
                self._say(f"the text is prepared ({took:.0f} s)")
            return self._work(waiting)

    @property
    def _data(self) -> Path:
        return self.folder.resolve() / "data"

    def _config(self, cell: Cell) -> Any:
        return self.size.config(cell, folder_of(self.folder.resolve(), cell), self._data, self._threads)

    def _waiting(self) -> list[Cell]:
        waiting = []
        for cell in self.grid.cells:
            summary = read_summary(folder_of(self.folder, cell))
            if summary is None:
                waiting.append(cell)
            else:
                self._seconds[cell] = summary["seconds_of_this_process"]
        return waiting

    def _work(self, waiting: list[Cell]) -> int:
        running: list[_Job] = []
        processes: list[subprocess.Popen[bytes]] = []
        with tempfile.TemporaryDirectory(prefix="longspan-") as meetings, forwarded_signals(processes) as received:
            try:
                while running or (waiting and not received):
                    while waiting and len(running) < self._jobs and not received:
                        job = self._start(waiting.pop(0), Path(meetings))
                        running.append(job)
                        processes.append(job.process)
                        if received:
                            # It came before the process was there to be told.
                            job.process.send_signal(signal.SIGTERM)
                    for job in [job for job in running if job.process.poll() is not None]:
                        running.remove(job)
                        processes.remove(job.process)
                        self._ended(job, bool(received), waiting, running)
                    time.sleep(0.05)
            finally:
                for job in running:
                    job.process.kill()
                    job.process.wait()
                    _close(job)
        if received:
            self._say(f"stopped, with {len(waiting)} trainings not begun: the same command goes on")
            return EXIT_STOPPED
        for cell in self._failed:
            self._say(f"failed: {cell}; its words are in {self._log(cell)}. The same command tries again")
        return EXIT_FAILED if self._failed else EXIT_DONE

    def _start(self, cell: Cell, meetings: Path) -> _Job:
        config = self.folder / "configs" / f"{cell.name}.toml"
        write_whole(config, to_toml(self._config(cell)).encode())
        meeting = meetings / cell.name
        meeting.mkdir()
        output = self._log(cell).open("ab")
        command = [sys.executable, "-m", "longspan", "train", "--config", str(config)]
        process = start_job(command, self._threads, meeting, output)
        return _Job(cell, process, meeting, output, time.monotonic())

    def _ended(self, job: _Job, stopped: bool, waiting: Sequence[Cell], running: Sequence[_Job]) -> None:
        code = job.process.returncode
        folder = folder_of(self.folder, job.cell)
        summary = read_summary(folder) if code == EXIT_DONE else None
        if summary is not None:
            self._seconds[job.cell] = time.monotonic() - job.started
            # Nobody goes on from a run that is done.
            shutil.rmtree(RunFolder(folder).checkpoints, ignore_errors=True)
            self._say(
                f"{job.cell}: {_described(summary)}; {self._seconds[job.cell]:.0f} s. {self._left(waiting, running)}"
            )
        elif not stopped:
            message, trace = failure_of_job(job.meeting, code)
            job.output.write(f"{trace}{message}\n".encode())
            self._failed.append(job.cell)
            self._say(f"{job.cell}: failed: {message}")
        _close(job)

    def _log(self, cell: Cell) -> Path:
        return self.folder / "logs" / f"{cell.name}.log"

    def _left(self, waiting: Sequence[Cell], running: Sequence[_Job]) -> str:
        """How much is left, by the time that cells like it have taken."""
        now = time.monotonic()
        seconds = sum(expected_seconds(cell, self._seconds) for cell in waiting)
        seconds += sum(max(0.0, expected_seconds(job.cell, self._seconds) - (now - job.started)) for job in running)
        num_left = len(waiting) + len(running)
        if not num_left:
            return "That was the last"
        return f"{num_left} left, about {_duration(seconds / min(self._jobs, num_left))}"


def expected_seconds(cell: Cell, known: dict[Cell, float]) -> float:
    """How long a training will take: the mean of those known that are most like it."""
    group = cell.group
    tests: tuple[Callable[[Cell], bool], ...] = (
        lambda other: other.group == group,
        lambda other: (other.group.task, other.group.mixer) == (group.task, group.mixer),
        lambda other: other.group.task == group.task,
        lambda other: True,
    )
    for is_like in tests:
        found = [seconds for other, seconds in known.items() if is_like(other)]
        if found:
            return statistics.fmean(found)
    return 0.0


def check_size(folder: Path, size: Size) -> None:
    """Raise ConfigError where the folder has a study of another size: its numbers could not stand beside these."""
    before = read_size(folder)
    if before is None or before == size:
        return
    old, new = before.as_json(), size.as_json()
    changes = ", ".join(f"{name} {old[name]!r} -> {new[name]!r}" for name in old if old[name] != new[name])
    raise ConfigError(f"{folder} has a study of another size ({changes}). Give these as they were, or another --out")


def read_size(folder: Path) -> Size | None:
    """The size of the study in a folder; None where there is none.

    Raises:
        ConfigError: for one that cannot be read.
    """
    path = folder / "size.json"
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}. Give another folder") from error
    return Size.of_json(values, path)


def write_size(folder: Path, size: Size) -> None:
    """Note the size of the study in a folder."""
    write_whole(folder / "size.json", (json.dumps(size.as_json(), indent=1) + "\n").encode())


def _close(job: _Job) -> None:
    job.output.close()
    assert job.process.stdin is not None
    job.process.stdin.close()


def _described(summary: dict[str, Any]) -> str:
    loss, accuracy = summary["validation_loss"], summary.get("validation_accuracy")
    if loss is None:
        return "its loss is not finite"
    return f"loss {loss:.3f}" + ("" if accuracy is None else f", accuracy {accuracy:.1%}")


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{max(1, minutes)} min"
