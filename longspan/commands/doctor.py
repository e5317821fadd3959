"""``longspan doctor``: what this machine and a group of ranks can do, and what is wrong with them."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from longspan.commands.options import parse_options, refuse
from longspan.errors import ConfigError, LongspanError
from longspan.launch import EXIT_DONE, EXIT_FAILED, Place, StopRequest, place_of_this_process, run_local_ranks, run_rank

_DESCRIPTION = """Say what this machine and a group of ranks can do, and what is wrong with them.

Starts ranks on this machine, or uses those of torchrun: start it there as the training will be started. Each line is ok, warning or
error; a warning or an error says what to do.

Exit codes: 0 no error, 1 an error.
"""


@dataclass(frozen=True)
class Doctor:
    """The group to look at."""

    ranks: int = 2
    """Ranks to start on this machine, 1 for none; torchrun's own number under torchrun."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What the ranks compute on: auto takes GPUs if there is one for each local rank."""
    timeout_seconds: float = 60.0
    """How long a rank waits for the others before it gives up."""


def run(arguments: Sequence[str]) -> int:
    """Look at this machine as the arguments ask, and return the exit code."""
    options = parse_options(Doctor, "doctor", _DESCRIPTION, arguments)
    try:
        place = place_of_this_process()
        if options.ranks < 1:
            raise ConfigError(f"ranks must be at least 1; got {options.ranks}")
        if not 0.0 < options.timeout_seconds < math.inf:
            raise ConfigError(f"timeout-seconds must be a finite number greater than 0; got {options.timeout_seconds}")
    except LongspanError as error:
        return refuse(error)
    if place is None and options.ranks > 1:
        return run_local_ranks([sys.executable, "-m", "longspan", "doctor", *arguments], options.ranks, 1)

    def as_rank(place: Place, stop: StopRequest) -> int:
        from longspan.commands.examination import examine_group, examine_machine, lines
        from longspan.train.ranks import Ranks

        ranks = Ranks.start(place, options.device, options.timeout_seconds, prefix="--")
        findings = [*examine_machine(ranks.device, place), *examine_group(ranks)]
        everyone = ranks.gather_json([finding.to_json() for finding in findings])
        text, failed = lines(everyone)
        if ranks.is_first:
            sys.stdout.write(text)
            sys.stdout.flush()
        ranks.close()
        return EXIT_FAILED if failed else EXIT_DONE

    return run_rank(place or Place(), as_rank)
