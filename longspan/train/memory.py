"""A process's memory: how much it holds, the most of a step, and giving back what was freed.

On the CPU memory is what is resident; on a GPU what PyTorch has allocated there.

glibc keeps freed memory for later. Large tensors begin at multiples of 2 MiB where they are in huge pages, and what is freed
between two of them is often too small for the next one, which then takes new memory: what a process holds grows from step to step,
while what it uses does not. `StepMemory` therefore gives freed pages back to the system every few steps. docs/performance.md has
the figures.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from pathlib import Path

import torch

_PROCESS = Path("/proc/self")


class Releases:
    """Called after each step, or each pass over a segment of time: gives freed memory back to the system after every so many.

    every: so many; 0 never does. It may be the `between` of a sequence or of a prompt in segments of time.
    """

    def __init__(self, every: int = 8) -> None:
        self._every = every
        self._num_passes = 0

    def __call__(self, done: object = None) -> None:
        self._num_passes += 1
        if self._every and self._num_passes % self._every == 0:
            release_freed_memory()


class StepMemory:
    """The memory of this process over the steps of a run.

    release_every: steps after which freed memory goes back to the system, or passes over segments of time, which leave as much; 0
    leaves it.
    """

    def __init__(self, device: torch.device, release_every: int) -> None:
        self.device = device
        self._releases = Releases(release_every)
        self._held = 0
        self.base = 0
        """Bytes held before the first step."""

    def begin(self) -> None:
        """The steps begin: what came before them is given back and forgotten."""
        release_freed_memory()
        self._held = self.base = current_memory_bytes(self.device)
        forget_peak(self.device)

    def take(self) -> tuple[int, int]:
        """Bytes held before this step, and the most held since the last call: in this step, and what followed the one before."""
        peak = peak_memory_bytes(self.device)
        forget_peak(self.device)
        return self._held, peak

    def pass_ended(self) -> None:
        """A pass over a segment of time has ended, inside of a step."""
        self._releases()

    def end(self) -> None:
        """A step has ended."""
        self.pass_ended()
        self._held = current_memory_bytes(self.device)


def current_memory_bytes(device: torch.device) -> int:
    """What this process holds now: allocated on its GPU, or resident; where the system does not tell, the most it has held."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        pages = int((_PROCESS / "statm").read_text().split()[1])
    except OSError:
        return peak_memory_bytes(device)
    import resource

    return pages * resource.getpagesize()


def peak_memory_bytes(device: torch.device) -> int:
    """The most that this process has held since `forget_peak`, or since its start where the system does not forget."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def forget_peak(device: torch.device) -> None:
    """Begin anew with the most that this process has held. Systems other than Linux keep that of the whole process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        # "Reset the peak resident set size to the process's current value": proc(5).
        (_PROCESS / "clear_refs").write_text("5")
    except OSError:
        return


def release_freed_memory() -> None:
    """Give the pages that no object uses back to the system, where the C library can: glibc's malloc_trim."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None
    return trim
