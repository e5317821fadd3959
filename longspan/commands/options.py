"""What every command does with its arguments: turn them into a dataclass, and refuse what does not fit."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TypeVar

from longspan.errors import LongspanError
from longspan.launch import EXIT_REFUSED, Place

Options = TypeVar("Options")


def parse_options(options: type[Options], command: str, description: str, arguments: Sequence[str]) -> Options:
    """The options that the arguments of a command ask for; ends the process where they ask for help, or do not fit.

    Args:
        options: a dataclass; its fields' docstrings are the help.
        command: what the user types before the options, such as ``"plan exchange"``.
        description: what the command does, shown above the list of options.
        arguments: those behind the command's name.
    """
    import tyro

    return tyro.cli(options, prog=f"longspan {command}", description=description, args=list(arguments))


def refuse(error: LongspanError, place: Place | None = None) -> int:
    """Print what is wrong, on the first rank alone, and return the exit code for it."""
    if place is None or place.rank == 0:
        sys.stderr.write(f"longspan: error: {error}\n")
    return EXIT_REFUSED
