"""A run outlives its terminal."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from longspan.train.report import Report

RECORD = {"step": 1, "loss": 1.0, "tokens_per_second": 1.0, "wait_share": 0.0, "peak_memory_bytes": 1}


class Gone(io.StringIO):
    """A terminal that has been closed."""

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error

    def isatty(self) -> bool:
        return False


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), BrokenPipeError(32, "Broken pipe")])
def test_a_report_goes_on_without_its_terminal(monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    monkeypatch.setattr(sys, "stdout", Gone(error))
    report = Report(1, 1, silent=False)
    report.heading("run", "folder")
    with report:
        report.step(RECORD)
        report.line("text")


def test_a_pipe_that_nobody_reads_ends_nothing() -> None:
    script = (
        "import time; from longspan.train.report import Report; r = Report(1, 1, False); r.line('first'); time.sleep(0.5)\n"
        "for _ in range(3): r.line('more')\n"
        "raise SystemExit(7)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == b"first\n"
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 7


def test_a_terminal_shows_a_bar_with_the_time_that_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # What stands for a terminal to rich.
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    report = Report(1000, 1, silent=False)
    with report:
        for step in range(1, 5):
            time.sleep(0.02)
            report.step(RECORD | {"step": step})
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().out)
    last = shown.replace("\r", "\n").strip().splitlines()[-1]
    # Some twenty seconds, or minutes on a busy machine.
    found = re.search(r"4/1000 loss 1\.000  1 tokens/s  waiting 0%  0\.00 GiB (\d+):(\d\d)$", last)
    assert found, shown
    assert int(found[1]) * 60 + int(found[2]) >= 15


def test_a_line_without_a_terminal_says_how_long_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a run that was gone on with at step 6: two steps in 20 s."""
    seconds = iter([0.0, 0.0, 10.0, 10.0, 20.0, 20.0, 50.0, 50.0])
    monkeypatch.setattr("longspan.train.report.time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    report = Report(10, 2, silent=False)
    with report:
        for step in (7, 8, 10):
            report.step(RECORD | {"step": step})
    shown = capsys.readouterr().out.splitlines()
    assert [line.rpartition("GiB  ")[2] for line in shown] == ["20 s, 20 s left", "50 s"]
