"""A run outlives its terminal."""

from __future__ import annotations

import io
import subprocess
import sys

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
