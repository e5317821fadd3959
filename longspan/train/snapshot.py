"""A snapshot of a GPU's memory over one training step, one file per rank, for https://pytorch.org/memory_viz."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from longspan.train.run_folder import writing


class MemorySnapshot:
    """Records what the optimizer step `step`, counted from 1, allocates and frees on this rank's GPU; None records nothing.

    PyTorch writes the file, with its own format: a pickle, which nothing here ever reads.
    """

    def __init__(self, folder: Path, step: int | None, rank: int) -> None:
        self.folder = folder
        self._step = step
        self._rank = rank

    def path(self, step: int) -> Path:
        """The file of this rank."""
        return self.folder / f"step-{step:08}-rank-{self._rank}-memory.pickle"

    @contextmanager
    def of(self, step: int) -> Iterator[None]:
        """Run a step; write its snapshot if it is the one asked for, also where it runs out of memory."""
        if step != self._step:
            yield
            return
        torch.cuda.memory._record_memory_history(max_entries=1_000_000)
        try:
            yield
        except Exception:
            # What the step raises is said, and not what a full disk adds to it.
            with contextlib.suppress(Exception):
                self._write(step)
            raise
        else:
            self._write(step)
        finally:
            torch.cuda.memory._record_memory_history(enabled=None)

    def _write(self, step: int) -> None:
        with writing(self.folder):
            self.folder.mkdir(exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(self.path(step)))
