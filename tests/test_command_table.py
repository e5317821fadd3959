"""The table of commands: each is found by its name, has a file of its own, and explains itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import NoReturn

import pytest

from longspan.cli import COMMANDS, Command, find, main, usage
from longspan.errors import ConfigError
from tests import copied

ROOT = Path(__file__).parents[1]


def test_each_command_has_a_file_named_after_it() -> None:
    for command in COMMANDS:
        module = import_module(command.module)
        assert callable(module.run), command.name
        assert command.module == f"longspan.commands.{command.name.replace(' ', '_')}"


def test_the_usage_has_each_command_in_a_line_that_fits_a_terminal() -> None:
    lines = usage().splitlines()
    assert max(map(len, lines)) <= 110
    for command in COMMANDS:
        assert sum(line.split("  ")[1].strip() == command.name for line in lines if line.startswith("  ")) == 1


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_each_command_explains_itself(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([*command.name.split(), "--help"])
    shown = capsys.readouterr().out
    assert f"longspan {command.name}" in " ".join(shown.split())


@pytest.mark.parametrize("asked", ["-h", "--help", "help"])
@pytest.mark.parametrize("first", ["eval", "plan", "bench"])
def test_the_first_of_two_words_explains_what_may_follow(
    first: str, asked: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([first, asked]) == 0
    shown = capsys.readouterr().out
    for command in COMMANDS:
        assert (f"  {command.name} " in shown) == command.name.startswith(f"{first} ")
    assert f"longspan {first} COMMAND --help" in shown


def test_a_command_is_found_by_its_first_words() -> None:
    assert find(["train", "exchange"]).name == "train"
    assert find(["plan", "exchange", "--ranks", "4"]).name == "plan exchange"
    with pytest.raises(ConfigError, match="unknown command 'exchange'"):
        find(["exchange"])
    with pytest.raises(ConfigError, match="plan takes what to look at"):
        find(["plan", "--ranks", "4"])


def test_each_command_is_in_the_documentation() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))
    for command in COMMANDS:
        assert f"longspan {command.name}" in text, command.name


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]], ids=" ".join)
def test_a_reader_that_leaves_early_is_no_failure(arguments: list[str], tmp_path: Path) -> None:
    """As ``longspan train --help | head`` has it."""
    errors = tmp_path / "errors"
    assert copied.call(_as_command_without_reader, arguments, errors) == 128 + signal.SIGPIPE
    assert errors.read_text() == ""


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]], ids=" ".join)
def test_a_new_interpreter_ends_so_too(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "longspan", *arguments], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert (done.stderr, done.returncode) == ("", 128 + signal.SIGPIPE)


def _as_command_without_reader(arguments: list[str], errors: Path) -> NoReturn:
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    # As the interpreter has it, where a process of multiprocessing may have been given another.
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.exit(main(arguments))
