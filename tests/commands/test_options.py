"""What a command prints: its own lines on stdout, and nothing else."""

from __future__ import annotations

import logging
import sys

import pytest

from longspan.commands.options import print_lines_of
from longspan.errors import ConfigError


def test_what_libraries_write_on_stdout_is_not_among_the_lines_of_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    """By print, and by a logger that keeps the stdout that it finds when it is imported, as DeepSpeed's does."""
    logger = logging.getLogger("a library")
    logger.propagate = False

    def work() -> list[str]:
        logger.addHandler(logging.StreamHandler(sys.stdout))
        logger.warning("no accelerator")
        sys.stdout.write("imported\n")
        return ["first", "second"]

    try:
        assert print_lines_of(work) == 0
    finally:
        logger.handlers.clear()
    shown = capsys.readouterr()
    assert shown.out == "first\nsecond\n"
    assert shown.err == "no accelerator\nimported\n"
    sys.stdout.write("and stdout is as before\n")
    assert capsys.readouterr().out == "and stdout is as before\n"


def test_stdout_is_as_before_where_a_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> list[str]:
        raise ConfigError("not this")

    assert print_lines_of(work) == 2
    sys.stdout.write("and stdout is as before\n")
    shown = capsys.readouterr()
    assert shown.out == "and stdout is as before\n" and "not this" in shown.err
