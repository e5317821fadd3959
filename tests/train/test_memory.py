"""A process's memory is told as it is, and what was freed goes back to the system."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from longspan.train.memory import StepMemory, current_memory_bytes, forget_peak, peak_memory_bytes

CPU = torch.device("cpu")
MIB = 2**20
linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="what Linux tells of a process")


@linux
def test_memory_is_what_is_held_and_a_peak_is_forgotten() -> None:
    before = current_memory_bytes(CPU)
    assert 50 * MIB < before < 10**12
    held = torch.ones(64 * MIB, dtype=torch.uint8)
    assert 60 * MIB < current_memory_bytes(CPU) - before < 80 * MIB
    peak = peak_memory_bytes(CPU)
    assert peak >= current_memory_bytes(CPU) - MIB
    del held
    forget_peak(CPU)
    assert peak - peak_memory_bytes(CPU) > 50 * MIB


@linux
def test_a_step_tells_the_most_since_the_step_before() -> None:
    memory = StepMemory(CPU, 8)
    memory.begin()
    base, first = memory.take()
    # What follows the reading of a step, as a validation does, counts for the next.
    held = torch.ones(64 * MIB, dtype=torch.uint8)
    del held
    memory.end()
    _, second = memory.take()
    memory.end()
    _, third = memory.take()
    assert second - first > 50 * MIB and second - third > 50 * MIB
    assert abs(base - current_memory_bytes(CPU)) < 20 * MIB


# Small objects between large ones keep the pages of these from going back by themselves.
FRAGMENTS = """
import torch
from longspan.train.memory import StepMemory, current_memory_bytes
cpu = torch.device("cpu")
large, small = [], []
for _ in range(2000):
    large.append(torch.ones(64 * 1024, dtype=torch.uint8))
    small.append(torch.ones(64, dtype=torch.uint8))
before = current_memory_bytes(cpu)
large.clear()
freed = current_memory_bytes(cpu)
for release_every, num_steps in ((0, 9), (4, 3)):
    memory = StepMemory(cpu, release_every)
    for number in range(num_steps):
        memory.end() if number % 2 else memory.pass_ended()
kept = current_memory_bytes(cpu)
memory.pass_ended()
print(before, freed, kept, current_memory_bytes(cpu))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_what_was_freed_between_others_goes_back_after_some_steps_and_passes() -> None:
    shown = subprocess.run([sys.executable, "-c", FRAGMENTS], capture_output=True, text=True, check=True).stdout
    before, freed, kept, released = map(int, shown.split())
    assert before - freed < 10 * MIB, "the allocator gives it back by itself: nothing is shown"
    assert before - kept < 10 * MIB, "it went back before the step that was asked for"
    assert before - released > 90 * MIB


@pytest.mark.slow
@linux
def test_the_main_job_does_not_grow(tmp_path: Path) -> None:
    """32 steps of the main job grew by 60 % on the second rank where nothing was given back."""
    command = [sys.executable, "-m", "longspan", "train", "--run.dir", str(tmp_path / "run"), "--train.steps", "32"]
    options = ["--data.max_bytes", "2000000", "--sample.tokens", "0", "--validation.every", "0"]
    subprocess.run([*command, *options], check=True, capture_output=True, timeout=900)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    peaks = [record["peak_memory_bytes"] for record in map(json.loads, lines) if "peak_memory_bytes" in record]
    assert max(peaks[24:]) < 1.1 * max(peaks[8:16]), [round(peak / MIB) for peak in peaks]
