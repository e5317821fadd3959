"""Commands of longspan in processes that are copies of one that has torch loaded, which takes a new interpreter seconds.

The command and the ranks that it starts are processes of their own, with their own arguments, pipes, environment and signals. That
they are started with the right command line, and load what they need, is for tests that start them anew, as of `tests/test_cli.py`.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tests.ranks import PRELOADED

LONGEST = 600.0


def run(arguments: Sequence[str | Path], stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """``longspan ARGUMENTS``, with what it has written and its exit code."""
    command = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory(prefix="longspan-copied-") as folder:
        given, out, err = (Path(folder, name) for name in ("in", "out", "err"))
        given.write_bytes(stdin)
        code = call(_as_command, command, dict(os.environ), given, out, err)
        return subprocess.CompletedProcess(command, code, out.read_bytes(), err.read_bytes())


def call(function: Callable[..., Any], *args: Any) -> int:
    """The exit code of a process that calls ``function(*args)``, defined at module level; negative for a signal."""
    process = Multiprocessing.get_context("spawn").Process(target=function, args=args)
    process.start()
    process.join(LONGEST)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"{function.__qualname__} did not end in {LONGEST:g} s")
    return process.exitcode


def _as_command(arguments: list[str], environment: dict[str, str], given: Path, out: Path, err: Path) -> NoReturn:
    from longspan import launch

    os.dup2(os.open(given, os.O_RDONLY), 0)
    sys.stdin = os.fdopen(0, closefd=False)
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    _take(environment)
    # In this process alone, whose ranks it starts.
    vars(launch)["subprocess"] = _CopiesForProcesses
    _main(arguments)


def _take(environment: Mapping[str, str]) -> None:
    import torch

    os.environ.clear()
    os.environ.update(environment)
    # Of a new process torch reads it as it is loaded.
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", "1")))


def _main(arguments: list[str]) -> NoReturn:
    from longspan.cli import main

    code: Any = 1
    try:
        code = main(arguments)
    except SystemExit as ending:
        code = ending.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code if isinstance(code, int) else 1)


class _Rank:
    """A copy of this process in place of ``python -m longspan ARGUMENTS``: what `longspan.launch` asks of a `subprocess.Popen`."""

    # A process sees the end of its pipe when nobody holds the other end any more.
    other_ends: list[int] = []  # noqa: RUF012 - of the process and not of one rank

    def __init__(
        self,
        command: list[str],
        *,
        env: Mapping[str, str],
        stdin: int,
        stdout: None,
        stderr: None,
        start_new_session: bool,
    ) -> None:
        assert command[:3] == [sys.executable, "-m", "longspan"] and start_new_session, command
        reader, writer = os.pipe()
        self.other_ends.append(writer)
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            os.setsid()
            os.dup2(reader, 0)
            for descriptor in (reader, *self.other_ends):
                os.close(descriptor)
            _take(env)
            _main(command[3:])
        os.close(reader)
        self.stdin = os.fdopen(writer, "wb")

    def poll(self, flags: int = os.WNOHANG) -> int | None:
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, flags)
            if ended:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self) -> int | None:
        return self.poll(0)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Multiprocessing:
    """In place of the module `multiprocessing` where that starts new interpreters."""

    parent_process = staticmethod(multiprocessing.parent_process)

    @staticmethod
    def get_context(method: str) -> multiprocessing.context.ForkServerContext:
        assert method == "spawn"
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        return context


class _CopiesForProcesses:
    """In place of the module `subprocess`."""

    PIPE = subprocess.PIPE
    Popen = _Rank
