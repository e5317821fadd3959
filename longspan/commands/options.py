"""What every command does with its arguments: turn them into a dataclass, and refuse what does not fit."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from longspan.errors import LongspanError
from longspan.launch import EXIT_DONE, Place, end_with_first_rank, place_of_this_process, report_failure

Options = TypeVar("Options")


def parse_options(
    options: type[Options], command: str, description: str, arguments: Sequence[str], **of_tyro: Any
) -> Options:
    """The options that the arguments of a command ask for; ends the process where they ask for help, or do not fit.

    Args:
        options: a dataclass; its fields' docstrings are the help.
        command: what the user types before the options, such as ``"plan exchange"``.
        description: what the command does, shown above the list of options.
        arguments: those behind the command's name.
        of_tyro: other arguments of `tyro.cli`.

    Of several ranks that torchrun has started the first one prints.
    """
    import tyro

    def parsed(prints: bool) -> Options:
        return tyro.cli(
            options,
            prog=f"longspan {command}",
            description=description,
            args=list(arguments),
            console_outputs=prints,
            **of_tyro,
        )

    place = _place()
    try:
        return parsed(prints=place.rank == 0)
    except SystemExit as ending:
        if ending.code:
            end_with_first_rank(place)
        if ending.code and place.rank:
            return parsed(prints=True)
        raise


def _place() -> Place:
    """This process's place; rank 0 where there is none, or where the environment gives a wrong one, which commands then refuse."""
    try:
        return place_of_this_process() or Place()
    except LongspanError:
        return Place()


def print_lines_of(work: Callable[[], Sequence[object]]) -> int:
    """Print what a command's work in one process returns, a line each, or why it is refused; return the exit code.

    These lines alone are on stdout. What the work itself writes there goes to stderr: Transformers imports DeepSpeed where it is
    installed, which says on stdout that it has found no accelerator.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):
            lines = work()
    except LongspanError as error:
        return refuse(error)
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return EXIT_DONE


def refuse(error: LongspanError) -> int:
    """Say what is wrong, on the first rank alone where all are refused, and return the exit code for it."""
    return report_failure(_place(), error)
