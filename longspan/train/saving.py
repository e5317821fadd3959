"""Checkpoints that all ranks write together: each its own share of the tensors, while training goes on if that is asked for.

    start     rank 0 makes the folder; every rank takes its share, copies it, and starts a thread that writes files
    finish    when all threads have ended: digests are gathered, and rank 0 completes the checkpoint

Threads write files and nothing else: what travels between ranks does so between steps, in the order of the program.
"""

from __future__ import annotations

import json
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from longspan.errors import CheckpointError, ExchangeError, LongspanError
from longspan.faults import reached
from longspan.train.checkpoint import (
    WrittenFile,
    abandon_checkpoint,
    begin_checkpoint,
    complete_checkpoint,
    not_written,
    temporary_folder,
    write_synced,
)
from longspan.train.loading import STATE
from longspan.train.ranks import Ranks


class CheckpointSaver:
    """Writes a run's checkpoints; every rank has one, and calls it at the same places.

    Args:
        folder: of all checkpoints.
        ranks: of the run.
        keep: how many complete checkpoints stay.
        asynchronous: whether `start` returns before files are written.
        timeout_seconds: of the ranks' collectives; a rank's files take less.
    """

    def __init__(
        self,
        folder: Path,
        ranks: Ranks,
        keep: int,
        asynchronous: bool = False,
        timeout_seconds: float = 600.0,
    ) -> None:
        self._folder = folder
        self._ranks = ranks
        self._keep = keep
        self._asynchronous = asynchronous
        # A rank gives its files up before the others give up the rank: so all of them hear which it was.
        self._timeout = 0.9 * timeout_seconds
        self._writing: _Writing | None = None

    @property
    def is_pending(self) -> bool:
        """Whether a checkpoint was started and is not complete: the same on every rank."""
        return self._writing is not None

    def start(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Begin the checkpoint of a step, after the one before is complete; complete it, unless asynchronous.

        Args:
            step: of which there is a checkpoint afterwards.
            tensors: by ``kind/name``, the same names and whole shapes on every rank; those that are not divided are the same.
            state: JSON, rank 0's.

        Raises:
            CheckpointError: on every rank, if one cannot write. Checkpoints that are complete stay as they are.
        """
        from longspan.train.storage import own_share, staged

        self.finish()
        ranks, folder = self._ranks, temporary_folder(self._folder, step)
        if not ranks.from_first(lambda: begin_checkpoint(self._folder, step)):
            return
        ranks.together(lambda: self._check_shared(folder))
        share = own_share(tensors, ranks.rank, ranks.world_size)
        if self._asynchronous:
            share = staged(share)
        content = json.dumps(state, indent=1).encode() if ranks.is_first else None
        self._writing = _Writing(step, folder, share, content, ranks.rank)
        if self._asynchronous:
            self._writing.thread.start()
        else:
            self._writing.run()
            self.finish()

    def advance(self) -> None:
        """Between two steps: complete the checkpoint if every rank has written its files. Raises as `start`."""
        if self._writing is None:
            return
        states = self._ranks.gather_numbers([self._writing.has_ended, self._writing.is_late(self._timeout)])
        if states[:, 0].all() or states[:, 1].any():
            self.finish()

    def finish(self) -> None:
        """Wait until the checkpoint that was started, if there is one, is complete. Raises as `start`."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        ranks, step = self._ranks, writing.step
        try:
            own = ranks.together(lambda: self._files_of(writing))
        except LongspanError:
            if ranks.is_first:
                abandon_checkpoint(self._folder, step)
            raise
        everyone: list[dict[str, WrittenFile]] = ranks.gather_json(own)
        files = {name: written for of_rank in everyone for name, written in of_rank.items()}
        ranks.from_first(lambda: str(complete_checkpoint(self._folder, step, files, self._keep)))

    def _check_shared(self, folder: Path) -> None:
        if not folder.is_dir():
            raise CheckpointError(
                f"rank {self._ranks.rank} does not see {folder}, which rank 0 has made. Give a run.dir on a file system that "
                "all hosts share"
            )

    def _files_of(self, writing: _Writing) -> dict[str, WrittenFile]:
        if not writing.wait(self._timeout):
            # The disk may answer again while others are told: no more is expected of it.
            raise ExchangeError(
                f"rank {self._ranks.rank} has not written its files of the checkpoint of step {writing.step} after "
                f"{self._timeout:g} s. Look at the disk of {self._folder}, or raise parallel.timeout_seconds. It was here "
                f"(most recent call first):\n{writing.stack()}"
            )
        if isinstance(writing.failure, OSError):
            raise not_written(self._folder, writing.step, f"rank {self._ranks.rank}: {writing.failure}")
        if writing.failure is not None:
            raise writing.failure
        return writing.files


class _Writing:
    """One rank's files of a checkpoint, written here or in a thread."""

    def __init__(self, step: int, folder: Path, share: dict[str, Tensor], state: bytes | None, rank: int) -> None:
        self.step = step
        self.files: dict[str, WrittenFile] = {}
        self.failure: BaseException | None = None
        # A daemon: a process that fails elsewhere does not wait for a disk.
        self.thread = threading.Thread(target=self.run, name="longspan-checkpoint", daemon=True)
        self._folder, self._share, self._state = folder, share, state
        self._rank = rank
        self._begun = time.monotonic()
        self._ended = threading.Event()

    def run(self) -> None:
        from longspan.train.storage import write_tensors

        try:
            if self._state is not None:
                reached("checkpoint.file", self.step)
                self.files[STATE] = write_synced(self._folder / STATE, self._state)
            self.files |= write_tensors(self._folder, self._share, self._rank, self.step)
        except BaseException as error:
            self.failure = error
        finally:
            self._share = {}
            self._ended.set()

    @property
    def has_ended(self) -> bool:
        return self._ended.is_set()

    def is_late(self, timeout: float) -> bool:
        return not self.has_ended and time.monotonic() - self._begun > timeout

    def wait(self, timeout: float) -> bool:
        """Until it has ended, at most `timeout` seconds after it began; whether it has."""
        return self._ended.wait(max(0.0, self._begun + timeout - time.monotonic()))

    def stack(self) -> str:
        """Where the thread is."""
        frame = sys._current_frames().get(self.thread.ident or 0)
        calls = reversed(traceback.format_stack(frame)) if frame is not None else ["  it has ended\n"]
        return "".join(calls).rstrip()
