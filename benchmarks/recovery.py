"""From the death of a rank to the step at which it died: torchrun, one restart, a timeline in seconds."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from benchmarks.harness import Table

# A checkpoint at every fifth step, and a death that costs the most steps after one.
_KILLED_AT, _EVERY, _STEPS = 14, 5, 18
_GOES_ON_FROM = _KILLED_AT // _EVERY * _EVERY
_OPTIONS = {
    "train.steps": _STEPS,
    "train.seq_len": 2048,
    "train.batch_tokens": 2048,
    "data.max_bytes": 2_000_000,
    "checkpoint.every": _EVERY,
    "validation.every": 0,
    "validation.sequences": 1,
    "sample.tokens": 0,
    "run.print_every": 1,
    "parallel.exchange": "all_gather",
    "run.go_on": True,
}
_EVENTS = {
    "the other rank has said what it saw": re.compile(r"longspan: error: rank 0 of 2"),
    "torchrun knows": re.compile(r"failed \(exitcode: -9\)"),
    "new ranks have met": re.compile(r"longspan +[0-9.]+, torch"),
    "the checkpoint is found": re.compile(rf"going on from step {_GOES_ON_FROM}"),
    "data, model and checkpoint are read": re.compile(r"model +[0-9.]+ M parameters"),
    "the first batch is checked": re.compile(r"check +first batch"),
}
_FIRST_STEP = f"step {_GOES_ON_FROM + 1}, the first one, is made again"
_CAUGHT_UP = f"step {_KILLED_AT} is made: caught up"


def recovery(quick: bool) -> Table:
    """A run in which rank 1 is killed, and one in which nothing is: their losses must be the same."""
    table = Table(
        "recovery",
        f"Rank 1 of 2 is killed in step {_KILLED_AT}, {_KILLED_AT - _GOES_ON_FROM - 1} steps after the last checkpoint",
        "a job that goes on by itself, and ends with the losses of one that nothing has interrupted",
        ["event", "seconds after the kill", "seconds since the event before"],
    )
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        _run(whole, "")
        timelines = []
        for number in range(1 if quick else 3):
            run = Path(folder) / str(number)
            timelines.append(_run(run, f"forward:rank=1:step={_KILLED_AT}:attempt=0:kill"))
            if _losses(run) != _losses(whole):
                raise SystemExit("recovery: the losses are not those of a run that nothing has interrupted")
    before = [0.0] * len(timelines)
    for event in [*_EVENTS, _FIRST_STEP, _CAUGHT_UP]:
        after = [timeline[event] for timeline in timelines]
        table.add(event, _spread(after), _spread([b - a for a, b in zip(before, after, strict=True)]))
        before = after
    return table


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def _losses(run: Path) -> list[tuple[int, float]]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(record["step"], record["loss"]) for record in records if "loss" in record]


def _run(run: Path, fault: str) -> dict[str, float]:
    """Train under torchrun; when each event was, in seconds after the fault."""
    options = [text for key, value in _OPTIONS.items() for text in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    environment = os.environ | {"LONGSPAN_FAULT": fault, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [*command, "-m", "longspan", "train", "--run.dir", str(run), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    lines: queue.SimpleQueue[tuple[float, str]] = queue.SimpleQueue()
    assert process.stdout is not None
    output = process.stdout

    def read() -> None:
        for line in output:
            lines.put((time.time(), line))

    threading.Thread(target=read, daemon=True).start()
    printed, killed, times = [], None, dict[str, float]()
    went_back = False
    while process.poll() is None or not lines.empty():
        with contextlib.suppress(queue.Empty):
            now, line = lines.get(timeout=0.005)
            printed.append(line)
            fell = re.search(r"longspan: fault: kill .* time ([0-9.]+)", line)
            killed = float(fell.group(1)) if fell else killed
            for event, pattern in _EVENTS.items():
                if killed is not None and pattern.search(line):
                    times.setdefault(event, now - killed)
        if killed is not None and "the first batch is checked" in times:
            step = _last_step(run)
            went_back = went_back or step == _GOES_ON_FROM
            if went_back and step > _GOES_ON_FROM:
                times.setdefault(_FIRST_STEP, time.time() - killed)
            if step >= _KILLED_AT:
                times.setdefault(_CAUGHT_UP, time.time() - killed)
    missing = [event for event in [*_EVENTS, _FIRST_STEP, _CAUGHT_UP] if event not in times] if fault else []
    if process.returncode or missing:
        raise SystemExit(f"recovery: exit code {process.returncode}, not seen: {missing}\n{''.join(printed[-60:])}")
    return times


def _last_step(run: Path) -> int:
    """The last whole line's step; 0 without one."""
    with contextlib.suppress(OSError, ValueError):
        lines = (run / "metrics.jsonl").read_text().splitlines()
        return int(json.loads(lines[-1])["step"]) if lines else 0
    return 0


TABLES = {"recovery": recovery}
