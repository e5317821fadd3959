"""The command line: ``longspan train``, ``longspan bench``, ``longspan plan``."""

from __future__ import annotations

import dataclasses
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from longspan.errors import ConfigError, LongspanError
from longspan.launch import (
    EXIT_DONE,
    EXIT_REFUSED,
    Place,
    StopRequest,
    num_cores,
    place_of_this_process,
    run_local_ranks,
    run_rank,
)

if TYPE_CHECKING:
    from longspan.train.config import Config
    from longspan.train.run_folder import RunFolder

Options = TypeVar("Options")

_USAGE = """usage: longspan COMMAND

  train             train a hybrid Linear-Llama3, sequence-parallel; without arguments a small one on this machine's CPU
  bench exchange    measure how long each topology takes to exchange states, on ranks of this machine or torchrun's
  plan exchange     the same by the cost model alone, for a cluster given by numbers

longspan train --help lists its options, and so do the others.
"""

_TRAIN_HELP = """Train a hybrid Linear-Llama3 sequence-parallel on real text.

Starts its own ranks on this machine, or uses those of torchrun. Besides the options below it takes

  --config FILE.toml    keys by section, as a run's config.toml has them; options below override it
  --resume [RUN]        go on with a run folder, or with the last one in runs/, from its newest checkpoint

Exit codes: 0 done, 1 failed, 2 refused (the message says how to mend it), 75 stopped by SIGTERM, SIGINT or SIGHUP
with a checkpoint.
"""

_BENCH_HELP = """Measure each topology's exchange of states, forward and backward, beside what the cost model says.

Starts its own ranks on this machine, or uses those of torchrun. Results are checked first; nothing hides the exchange.
"""

_PLAN_HELP = """What each topology's exchange of states would cost on a cluster given by numbers: nothing is measured.

Rates have units, 400gbit or 45GB a second, and so have times: 15us, 0.2ms.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names, prompts and samples may hold what the terminal's encoding does not.
        sys.stdout.reconfigure(errors="backslashreplace")
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(_USAGE)
        return 0 if arguments else EXIT_REFUSED
    if arguments[0] == "--version":
        import longspan

        sys.stdout.write(f"longspan {longspan.__version__}\n")
        return 0
    if arguments[0] == "train":
        return _train(arguments)
    commands = {"bench": _bench_exchange, "plan": _plan_exchange}
    if arguments[0] not in commands:
        sys.stderr.write(f"longspan: error: unknown command {arguments[0]!r}: the commands are train, bench and plan\n")
        return EXIT_REFUSED
    if arguments[1:2] != ["exchange"]:
        what = arguments[1] if arguments[1:] else "nothing"
        sys.stderr.write(f"longspan: error: {arguments[0]} takes what to look at, which is exchange; got {what}\n")
        return EXIT_REFUSED
    return commands[arguments[0]](arguments)


def _train(arguments: list[str]) -> int:
    from longspan.train.config import check, check_degrees

    place = None
    try:
        place = place_of_this_process()
        config, resume = parse_train(arguments[1:])
        check(config)
        if place is None:
            num_ranks = config.parallel.sp * (config.parallel.dp or 1)
            check_degrees(config, num_ranks)
    except LongspanError as error:
        return _refuse(error, place)
    if place is None and num_ranks > 1:
        command = [sys.executable, "-m", "longspan", *arguments]
        return run_local_ranks(command, num_ranks, config.parallel.threads or max(1, num_cores() // num_ranks))

    def run(place: Place, stop: StopRequest) -> int:
        from longspan.train.run import train

        return train(config, place, stop, resume)

    return run_rank(place or Place(), run)


def _bench_exchange(arguments: list[str]) -> int:
    from longspan.commands.bench_options import BenchExchange

    options = _parse_options(BenchExchange, "longspan bench exchange", _BENCH_HELP, arguments[2:])
    place = None
    try:
        place = place_of_this_process()
        options.check(options.ranks if place is None else place.world_size)
    except LongspanError as error:
        return _refuse(error, place)
    if place is None:
        return run_local_ranks([sys.executable, "-m", "longspan", *arguments], options.ranks, options.threads)

    def run(place: Place, stop: StopRequest) -> int:
        from longspan.commands.bench_exchange import bench_exchange

        return bench_exchange(options, place)

    return run_rank(place, run)


def _plan_exchange(arguments: list[str]) -> int:
    from longspan.commands.plan_exchange import PlanExchange
    from longspan.ops.variants import VARIANTS

    options = _parse_options(PlanExchange, "longspan plan exchange", _PLAN_HELP, arguments[2:])
    try:
        if options.operator not in VARIANTS:
            raise ConfigError(f"operator must be one of {', '.join(VARIANTS)}; got {options.operator!r}")
        sys.stdout.write(options.report(VARIANTS[options.operator].transition))
    except LongspanError as error:
        return _refuse(error, None)
    return EXIT_DONE


def _parse_options(options: type[Options], command: str, description: str, arguments: list[str]) -> Options:
    """The options that the arguments of a command ask for; ends the process where they ask for help, or do not fit."""
    import tyro

    return tyro.cli(options, prog=command, description=description, args=arguments)


def _refuse(error: LongspanError, place: Place | None) -> int:
    if place is None or place.rank == 0:
        sys.stderr.write(f"longspan: error: {error}\n")
    return EXIT_REFUSED


def parse_train(arguments: Sequence[str]) -> tuple[Config, RunFolder | None]:
    """The config that the arguments of ``longspan train`` ask for, and the run to go on with.

    Raises:
        ConfigError: for an unknown option, a config file that does not fit, or options that exclude each other.
        CheckpointError: if there is no run to resume.
    """
    import tyro

    from longspan.train.config import Config, check_arguments, read_toml
    from longspan.train.run_folder import find_run_to_resume

    remaining, toml, resume_given, resume_path = _take_own_options(arguments)
    check_arguments(remaining, others=("help", "config", "resume"))
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
    config = tyro.cli(
        Config,
        prog="longspan train",
        description=_TRAIN_HELP,
        default=default,
        args=remaining,
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


if __name__ == "__main__":
    sys.exit(main())
