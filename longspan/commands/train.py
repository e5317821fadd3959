"""``longspan train``: what it is told, on which ranks it runs."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from longspan.commands.options import parse_options, refuse
from longspan.errors import ConfigError, LongspanError
from longspan.launch import Place, StopRequest, num_cores, place_of_this_process, run_local_ranks, run_rank

if TYPE_CHECKING:
    from longspan.train.config import Config
    from longspan.train.run_folder import RunFolder

_DESCRIPTION = """Train a hybrid Linear-Llama3 sequence-parallel on real text.

Starts its own ranks on this machine, or uses those of torchrun. Besides the options below it takes

  --config FILE.toml    keys by section, as a run's config.toml has them; options below override it
  --model.preset NAME   the model of that name (longspan.models.PRESETS), which the other model options change
  --resume [RUN]        go on with a run folder, or with the last one in runs/, from its newest checkpoint

Exit codes: 0 done, 1 failed, 2 refused (the message says how to mend it), 75 stopped by SIGTERM, SIGINT or SIGHUP
with a checkpoint, 128 + n by a second signal n, or by one before the first step, at once.
"""


def run(arguments: Sequence[str]) -> int:
    """Train as the arguments ask, and return the exit code."""
    from longspan.train.config_checks import check, check_degrees, num_ranks_asked_for

    try:
        place = place_of_this_process()
        config, resume = parse_train(arguments)
        check(config)
        if place is None:
            num_ranks = num_ranks_asked_for(config)
            check_degrees(config, num_ranks)
    except LongspanError as error:
        return refuse(error)
    if place is None and num_ranks > 1:
        command = [sys.executable, "-m", "longspan", "train", *arguments]
        threads = config.parallel.threads or max(1, num_cores() // num_ranks)
        return run_local_ranks(command, num_ranks, threads, "stopped before the first step: nothing was saved")

    def as_rank(place: Place, stop: StopRequest) -> int:
        from longspan.train.run import train

        return train(config, place, stop, resume)

    return run_rank(place or Place(), as_rank)


def parse_train(arguments: Sequence[str]) -> tuple[Config, RunFolder | None]:
    """The config that the arguments of ``longspan train`` ask for, and the run to go on with.

    Raises:
        ConfigError: for an unknown option, a config file that does not fit, or options that exclude each other.
        CheckpointError: if there is no run to resume.
    """
    import tyro

    from longspan.train.config import Config, check_arguments, read_toml, take_preset
    from longspan.train.run_folder import find_run_to_resume

    remaining, toml, resume_given, resume_path = _take_own_options(arguments)
    check_arguments(remaining, others=("help", "config", "resume", "model.preset"))
    if toml is not None and resume_given:
        raise ConfigError(
            "--config and --resume exclude each other: a resumed run has its own config.toml. Leave one out"
        )
    folder = find_run_to_resume(resume_path) if resume_given else None
    default = Config()
    if folder is not None:
        default = read_toml(folder.config)
    elif toml is not None:
        default = read_toml(Path(toml))
    remaining, default = take_preset(remaining, default)
    config = parse_options(
        *(Config, "train", _DESCRIPTION, remaining),
        default=default,
        use_underscores=True,
        config=(tyro.conf.FlagConversionOff,),
    )
    if folder is not None:
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(folder.path)))
    return config, folder


def _take_own_options(arguments: Sequence[str]) -> tuple[list[str], str | None, bool, str | None]:
    """Split off ``--config`` and ``--resume``: (the other arguments, config file, whether to resume, run folder)."""
    remaining: list[str] = []
    toml: str | None = None
    resume_given, resume_path = False, None
    queue = list(arguments)
    while queue:
        argument = queue.pop(0)
        name, equals, value = argument.partition("=")
        if name == "--config":
            if not equals and not queue:
                raise ConfigError("--config needs a file: --config FILE.toml")
            toml = value if equals else queue.pop(0)
        elif name == "--resume":
            resume_given = True
            if equals:
                resume_path = value
            elif queue and not queue[0].startswith("--"):
                resume_path = queue.pop(0)
        else:
            remaining.append(argument)
    return remaining, toml, resume_given, resume_path
