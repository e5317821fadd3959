"""The command line: which commands there are. Each is one file in `longspan.commands`, imported when it is called."""

from __future__ import annotations

import io
import os
import select
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from longspan.errors import ConfigError
from longspan.launch import EXIT_REFUSED


@dataclass(frozen=True)
class Command:
    """A command: its name, of one or two words, what it does in a line, and the module whose `run` does it.

    `run` takes the arguments behind the name, a list of strings, and returns the exit code.
    """

    name: str
    summary: str
    module: str


COMMANDS = (
    Command(
        "train",
        "train a hybrid Linear-Llama3, sequence-parallel; without options a small one, on this CPU",
        "longspan.commands.train",
    ),
    Command(
        "prepare",
        "turn text, JSON lines, Parquet or a Hugging Face data set into token files for train",
        "longspan.commands.prepare",
    ),
    Command(
        "generate",
        "write text behind a prompt, by the model of a run; the prompt read over ranks",
        "longspan.commands.generate",
    ),
    Command(
        "export",
        "write the model of a run as Hugging Face Transformers reads it, with its tokenizer",
        "longspan.commands.export",
    ),
    Command(
        "import",
        "make a run folder of a Linear-Llama3 that Hugging Face Transformers has written",
        "longspan.commands.import",
    ),
    Command(
        "eval loss",
        "the loss of a run's model on text, by position and by document length",
        "longspan.commands.eval_loss",
    ),
    Command(
        "eval recall",
        "multi-query associative recall of a run's model, by pairs and length",
        "longspan.commands.eval_recall",
    ),
    Command(
        "eval needle",
        "whether a run's model finds a number in a long text, by length and depth",
        "longspan.commands.eval_needle",
    ),
    Command(
        "eval passkey",
        "whether a run's model finds a pass key between sentences that repeat",
        "longspan.commands.eval_passkey",
    ),
    Command(
        "eval lm",
        "tasks of lm-eval on a run's model, through its Hugging Face form",
        "longspan.commands.eval_lm",
    ),
    Command(
        "convert",
        "make a run folder of a Llama: its weights in linear and softmax layers, attention transfer",
        "longspan.commands.convert",
    ),
    Command(
        "plot",
        "draw loss, tokens per second and memory of runs, over each other",
        "longspan.commands.plot",
    ),
    Command(
        "study",
        "train each mixer, pure and with softmax layers, on text and on recall; a table and a figure",
        "longspan.commands.study",
    ),
    Command(
        "verify",
        "checkpoints and prepared data against their digests; a config over ranks against one process",
        "longspan.commands.verify",
    ),
    Command(
        "doctor",
        "what this machine and a group of ranks can do, and what is wrong with them",
        "longspan.commands.doctor",
    ),
    Command(
        "plan train",
        "memory of a rank and time of a step, for a mesh of any size, without starting one",
        "longspan.commands.plan_train",
    ),
    Command(
        "plan exchange",
        "what each topology's exchange of states would cost, on a cluster given by numbers",
        "longspan.commands.plan_exchange",
    ),
    Command(
        "bench exchange",
        "measure each topology's exchange of states, on ranks of this machine or of torchrun",
        "longspan.commands.bench_exchange",
    ),
)


_HELP = ("-h", "--help", "help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    try:
        code = _main(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        if not _reader_has_left():
            raise
        # As head and less do: there is nobody to tell. What is still buffered goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _reader_has_left() -> bool:
    """Whether nobody reads what this process prints, where the system tells."""
    if not hasattr(select, "poll"):
        return False
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _main(arguments: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["--"]:
        # Stands behind -m longspan where torchrun must not take --run for an option of its own; some versions of Python hand it on.
        arguments = arguments[1:]
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names, prompts and samples may hold what the terminal's encoding does not.
        sys.stdout.reconfigure(errors="backslashreplace")
    if not arguments or arguments[0] in _HELP:
        sys.stdout.write(usage())
        return 0 if arguments else EXIT_REFUSED
    if arguments[1:] and arguments[1] in _HELP and seconds_of(arguments[0]):
        sys.stdout.write(usage(arguments[0]))
        return 0
    if arguments[0] == "--version":
        import longspan

        sys.stdout.write(f"longspan {longspan.__version__}\n")
        return 0
    try:
        command = find(arguments)
    except ConfigError as error:
        from longspan.commands.options import refuse

        return refuse(error)
    code: int = import_module(command.module).run(arguments[len(command.name.split()) :])
    return code


def usage(first: str | None = None) -> str:
    """What ``longspan --help`` prints; first: ``longspan FIRST --help``, of the commands of two words that begin with it."""
    commands = [command for command in COMMANDS if first is None or command.name.startswith(f"{first} ")]
    width = max(len(command.name) for command in commands)
    name = "COMMAND" if first is None else f"{first} COMMAND"
    lines = [f"  {command.name:<{width}}  {command.summary}" for command in commands]
    return "\n".join(
        [
            "longspan: sequence parallelism for linear-attention and hybrid transformers",
            "",
            f"usage: longspan {name} [OPTIONS]",
            "",
            *lines,
            "",
            f"longspan {name} --help says what a command does, its options and their defaults.",
            "longspan --version says which version this is.",
            "",
        ]
    )


def seconds_of(first: str) -> list[str]:
    """The second words of the commands of two words that begin with this one."""
    return [command.name.split()[1] for command in COMMANDS if command.name.startswith(f"{first} ")]


def find(arguments: Sequence[str]) -> Command:
    """The command that the first one or two arguments name.

    Raises:
        ConfigError: if they name none.
    """
    for command in COMMANDS:
        words = command.name.split()
        if list(arguments[: len(words)]) == words:
            return command
    first = arguments[0]
    seconds = seconds_of(first)
    if seconds:
        what = arguments[1] if arguments[1:] else "nothing"
        raise ConfigError(f"{first} takes what to look at, which is {' or '.join(seconds)}; got {what}")
    names = ", ".join(command.name for command in COMMANDS)
    raise ConfigError(f"unknown command {first!r}: the commands are {names}")


if __name__ == "__main__":
    sys.exit(main())
