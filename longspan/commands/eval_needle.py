"""``longspan eval needle``: whether a run's model finds a number in a long text of the kind that it was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from longspan.commands.evaluation import run_evaluation
from longspan.commands.hidden_keys import HiddenKeyOptions, find_hidden_keys

_DESCRIPTION = """Whether a run's model finds a number that a sentence gives somewhere in a long text, by length and depth.

  longspan eval needle --run runs/my-run --lengths 1024 4096 16384 --parallel.sp 4 --plot needle.png

The text is held-out text of the run. Its end asks for the number: found means that the model, taking the likeliest token each time,
writes it.
"""


def run(arguments: Sequence[str]) -> int:
    """Evaluate as the arguments ask, and return the exit code."""
    return run_evaluation("needle", HiddenKeyOptions, _DESCRIPTION, arguments, partial(find_hidden_keys, "needle"))
