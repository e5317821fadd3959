"""``longspan eval passkey``: whether a run's model finds a pass key between sentences that repeat."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from longspan.commands.evaluation import run_evaluation
from longspan.commands.hidden_keys import HiddenKeyOptions, find_hidden_keys

_DESCRIPTION = """Whether a run's model finds a pass key between sentences that repeat (arXiv 2305.16300), by length and depth.

  longspan eval passkey --run runs/my-run --lengths 1024 4096 16384 --parallel.sp 4 --plot passkey.png

The text's end asks for the key: found means that the model, taking the likeliest token each time, writes it.
"""


def run(arguments: Sequence[str]) -> int:
    """Evaluate as the arguments ask, and return the exit code."""
    return run_evaluation("passkey", HiddenKeyOptions, _DESCRIPTION, arguments, partial(find_hidden_keys, "passkey"))
