"""A Chrome trace of one training step, one file per rank: what ran when, for chrome://tracing or ui.perfetto.dev."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, _ExperimentalConfig, profile

from longspan.comm.profiling import named_range
from longspan.train.run_folder import writing


class StepTrace:
    """Records the optimizer step `step`, counted from 1, on this rank; None records nothing.

    The profiler is on during that step alone, which takes longer for it.
    """

    def __init__(self, folder: Path, step: int | None, rank: int, device: torch.device) -> None:
        self.folder = folder
        self._step = step
        self._rank = rank
        self._activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            self._activities.append(ProfilerActivity.CUDA)

    def path(self, step: int) -> Path:
        """The file of this rank."""
        return self.folder / f"step-{step:08}-rank-{self._rank}.json"

    @contextmanager
    def of(self, step: int) -> Iterator[None]:
        """Run a step; write its trace if it is the one asked for."""
        if step != self._step:
            yield
            return
        # All threads: exchanges run beside the main one.
        everywhere = _ExperimentalConfig(profile_all_threads=True)
        with profile(activities=self._activities, experimental_config=everywhere) as profiler:
            profiler.add_metadata_json("step", str(step))
            profiler.add_metadata_json("rank", str(self._rank))
            with named_range(f"longspan.train.step {step}"):
                yield
        with writing(self.folder):
            self.folder.mkdir(exist_ok=True)
            unfinished = self.path(step).with_suffix(".tmp")
            profiler.export_chrome_trace(str(unfinished))
            unfinished.replace(self.path(step))
