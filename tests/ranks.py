"""Run a function on several local ranks and get the values back.

    def sum_of_ranks():                       # at module level of a test module, so that it can be pickled
        total = torch.tensor([float(dist.get_rank())])
        dist.all_reduce(total)
        return total

    def test_sum():
        assert [t.item() for t in run_on_ranks(3, sum_of_ranks)] == [3.0, 3.0, 3.0]

Starting a rank costs some seconds (importing torch), so ranks are forked from one process that has imported it, and
the ranks of each world size serve every test of the session. A call that fails or runs out of time leaves its ranks out
of step with each other: they are killed, and the next call starts fresh ones. Use `raised` for errors that a test
expects: it catches them on the rank, and the ranks stay.

A group of gloo has a thread that wakes a hundred times a second, on every rank. Tests make hundreds of groups, so the ranks leave
all of them, and meet anew, after a call that leaves more than a few; and where Linux can, ranks that no call runs on are stopped.

The ranks run gloo with one thread each, listen on loopback alone, use the warning filters of the calling test, and
have torch.distributed's debug level DETAIL, which turns collectives that do not match into Python errors.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import gc
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

START_TIMEOUT = 180.0
# After one rank has failed, the others get this long to report their own errors before they are stopped.
GRACE_AFTER_FAILURE = 1.0
LOG_TAIL_CHARACTERS = 6000
# Groups of a rank, the default one included, beyond which the ranks meet anew after a call: more than exchanges make beside one
# group, for making those anew takes ten times as long as a small call.
MOST_GROUPS = 16
# What ranks would each import, for a second or two, in their first call; the compiler comes with `use_deterministic_algorithms`.
PRELOADED = ["torch.distributed.fsdp", "torch._inductor", "longspan.train.run", "pytest"]
# Linux kills ranks whose fork server has ended: prctl(2).
_ENDS_WITH_PARENT = sys.platform == "linux"
_PR_SET_PDEATHSIG = 1
# A rank that computes for less than this share of a time is stuck: on a machine that is busy with other things, too, it gets more.
STUCK_SHARE = 0.005
# Times the timeout of a call, after which it is given up even if its ranks compute.
LONGEST_WAIT = 10


@dataclass(frozen=True)
class RankFailure:
    """What went wrong on one rank: the exception's type name and message, and where."""

    type_name: str
    message: str
    traceback: str


class RankError(Exception):
    """At least one rank raised, died or did not answer in time; `errors` maps the rank to its `RankFailure`."""

    def __init__(self, summary: str, errors: dict[int, RankFailure]) -> None:
        self.errors = errors
        parts = [summary]
        for rank, failure in sorted(errors.items()):
            parts.append(f"rank {rank}: {failure.type_name}: {failure.message}\n{failure.traceback.rstrip()}")
        super().__init__("\n\n".join(parts))


def run_on_ranks(
    num_ranks: int, function: Callable[..., Any], *args: Any, timeout: float = 60.0, checked: bool = True
) -> list[Any]:
    """Call `function(*args)` on every one of `num_ranks` gloo ranks and return the values by rank.

    The default group is initialised; a function asks `dist.get_rank()` for its rank. Function, arguments and return
    values are pickled: tensors are copied, whatever their dtype.

    Args:
        num_ranks: number of processes, 1 or more; one rank is a process with a group of one, too.
        function: defined at module level of an importable module.
        timeout: seconds after which the call is given up if no rank that is awaited has computed anything in them, so that a busy
            machine fails no test. After ten times as long it is given up in any case (on systems that do not tell what a process
            has computed, only then).
        checked: whether collectives that do not match are errors. torch's DistributedDataParallel ends a process that checks them.

    Raises:
        RankError: a rank raised, died, or did not answer in time.
    """
    if function.__module__ == "__main__":
        raise ValueError(f"{function.__qualname__} is defined in __main__; ranks can only import it from a module")
    kind = (num_ranks, checked)
    for other in _pools.values():
        other.rest()
    pool = _pools.get(kind)
    if pool is None:
        pool = _pools[kind] = _Pool(num_ranks, checked)
    try:
        return pool.call(function, args, timeout)
    except BaseException:
        # Also on an interrupt: the ranks are inside a call whose answers nobody will collect.
        del _pools[kind]
        pool.kill()
        raise


def raised(function: Callable[..., Any], *args: Any) -> tuple[str, str]:
    """Call `function(*args)`, which must raise; return the type name and the message of what it raised.

    `run_on_ranks(2, raised, function)` checks an expected error on every rank without losing the ranks, as long as all
    of them raise before they meet in a collective.
    """
    try:
        function(*args)
    except Exception as error:
        return type(error).__name__, str(error)
    raise AssertionError(f"{getattr(function, '__qualname__', function)} raised nothing")


def stop_ranks() -> None:
    """Kill the ranks of every world size; the next call starts new ones."""
    while _pools:
        _, pool = _pools.popitem()
        pool.kill()


_pools: dict[tuple[int, bool], _Pool] = {}
atexit.register(stop_ranks)


class _Pool:
    """The processes of one world size and the pipes to them."""

    def __init__(self, num_ranks: int, checked: bool) -> None:
        self.num_ranks = num_ranks
        self.checked = checked
        self.folder = Path(tempfile.mkdtemp(prefix=f"longspan-ranks-{num_ranks}-"))
        self.processes: list[BaseProcess] = []
        self.connections: list[Connection] = []
        self.num_groups = 1
        self.meetings = 0
        self.is_meeting = False
        self.is_resting = False
        try:
            for rank in range(num_ranks):
                self._start(rank)
            self._collect("start", START_TIMEOUT)
        except BaseException:
            self.kill()
            raise

    def _start(self, rank: int) -> None:
        # A fork server and not a fork of this process, which may have threads and a process group of its own.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_serve, args=(rank, self.num_ranks, self.checked, theirs, self.folder), daemon=True
        )
        with theirs:
            process.start()
        self.processes.append(process)
        self.connections.append(ours)

    def rest(self) -> None:
        """Stop the processes until the next call, unless they are meeting."""
        if self.is_resting or not _ENDS_WITH_PARENT:
            return
        if self.is_meeting and not all(connection.poll() for connection in self.connections):
            return
        self._signal(signal.SIGSTOP)
        self.is_resting = True

    def _signal(self, number: signal.Signals) -> None:
        for process in self.processes:
            # One that has died shows in `_collect`.
            if process.pid is not None and process.exitcode is None:
                os.kill(process.pid, number)

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
        if self.is_resting:
            self._signal(signal.SIGCONT)
            self.is_resting = False
        if self.is_meeting:
            self._collect("meeting anew", START_TIMEOUT)
            self.is_meeting = False
        self._send((list(sys.path), _warning_filters(), pickle.dumps((function, args))))
        values = self._collect(f"{function.__module__}.{function.__qualname__}", timeout)
        if self.num_groups > MOST_GROUPS:
            self.meetings += 1
            self._send(self.meetings)
            self.is_meeting = True
        self.rest()
        return values

    def _send(self, request: tuple[Any, ...] | int) -> None:
        """Send the arguments of `_answer`, or the number of a meeting."""
        pickled = pickle.dumps(request)
        for connection in self.connections:
            # A rank that died since the last call shows in `_collect`, with its log.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.send_bytes(pickled)

    def _collect(self, what: str, timeout: float) -> list[Any]:
        """Wait for one answer of every rank."""
        values: dict[int, Any] = {}
        errors: dict[int, RankFailure] = {}
        waiting = {connection: rank for rank, connection in enumerate(self.connections)}
        begun = time.monotonic()
        deadline = begun + LONGEST_WAIT * timeout
        progress = _Progress(timeout)
        while waiting:
            patience = min(timeout / 4, max(0.0, deadline - time.monotonic()))
            ready = wait(list(waiting), timeout=patience)
            if not ready:
                awaited = [self.processes[rank].pid for rank in waiting.values()]
                if time.monotonic() >= deadline or progress.has_ended(awaited):
                    break
                continue
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                try:
                    answer = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionResetError):
                    errors[rank] = self._died(rank)
                else:
                    if isinstance(answer, RankFailure):
                        errors[rank] = answer
                    else:
                        values[rank], self.num_groups = answer
            if errors:
                deadline = min(deadline, time.monotonic() + GRACE_AFTER_FAILURE)
        if errors:
            stopped = f"; ranks {sorted(waiting.values())} had not answered and were stopped" if waiting else ""
            raise RankError(f"{what} failed on ranks {sorted(errors)} of {self.num_ranks}{stopped}", errors)
        if waiting:
            late = sorted(waiting.values())
            stacks = self._stacks(late)
            seconds = time.monotonic() - begun
            timeouts = {r: RankFailure("TimeoutError", f"no answer after {seconds:.0f} s", stacks[r]) for r in late}
            raise RankError(f"{what} ran out of time on ranks {late} of {self.num_ranks}", timeouts)
        return [values[rank] for rank in range(self.num_ranks)]

    def _died(self, rank: int) -> RankFailure:
        self.processes[rank].join(timeout=5)
        return RankFailure("ProcessDied", f"exit code {self.processes[rank].exitcode}", self._log_tail(rank))

    def _stacks(self, ranks: list[int]) -> dict[int, str]:
        """What the ranks are doing now: each dumps the stacks of its threads into its log."""
        for rank in ranks:
            process_id = self.processes[rank].pid
            if process_id is not None and self.processes[rank].is_alive():
                os.kill(process_id, signal.SIGUSR1)
        time.sleep(0.3)
        return {rank: self._log_tail(rank) for rank in ranks}

    def _log_tail(self, rank: int) -> str:
        log = _log_path(self.folder, rank)
        return log.read_text(errors="replace")[-LOG_TAIL_CHARACTERS:] if log.exists() else ""

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        for connection in self.connections:
            connection.close()
        shutil.rmtree(self.folder, ignore_errors=True)


class _Progress:
    """Whether processes compute, asked again and again."""

    def __init__(self, patience: float) -> None:
        self.patience = patience
        self.since = time.monotonic()
        self.seconds: float | None = None

    def has_ended(self, process_ids: list[int | None]) -> bool:
        """Whether none of them has computed anything for as long as `patience`; False where the system does not tell."""
        now = time.monotonic()
        seconds = _computed_seconds(process_ids)
        if seconds is None:
            return False
        if self.seconds is None or abs(seconds - self.seconds) > STUCK_SHARE * self.patience:
            self.since, self.seconds = now, seconds
        return now - self.since >= self.patience


def _computed_seconds(process_ids: list[int | None]) -> float | None:
    """Processor time of the processes' threads, without gloo's, which wake to find nothing; None where the system does not tell."""
    if not Path("/proc/self/task").exists():
        return None
    ticks = 0
    for process_id in process_ids:
        for thread in Path(f"/proc/{process_id}/task").glob("*/stat"):
            # A thread or process may have ended since it was listed.
            with contextlib.suppress(OSError):
                name, _, numbers = thread.read_text().rpartition(")")
                if "gloo" not in name:
                    ticks += sum(map(int, numbers.split()[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


def _log_path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.log"


def _warning_filters() -> list[tuple[Any, ...]]:
    """The warning filters in force here, as arguments of `warnings.filterwarnings`."""

    def pattern(value: Any) -> str:
        return value if isinstance(value, str) else getattr(value, "pattern", "")

    return [
        (action, pattern(message), category, pattern(module), lineno)
        for action, message, category, module, lineno in warnings.filters
        # pytest's own categories would make every rank import pytest, and no rank emits them.
        if isinstance(category, type) and not category.__module__.startswith(("pytest", "_pytest"))
    ]


def _serve(rank: int, num_ranks: int, checked: bool, connection: Connection, folder: Path) -> None:
    """A rank's life: join the group, then answer calls until the pipe closes."""
    import torch
    import torch.distributed as dist

    # What is loaded stays: the collector need not look through it, each time that it runs, for what nobody holds any more.
    gc.freeze()
    log = os.open(_log_path(folder, rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.register(signal.SIGUSR1, file=log, all_threads=True)
    # An interrupt at the terminal reaches the whole process group; the test run decides what becomes of its ranks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if _ENDS_WITH_PARENT:
        _end_with_parent()
    else:
        threading.Thread(target=_exit_with_parent, args=(os.getppid(),), daemon=True).start()
    for _, name in socket.if_nameindex():
        if name in ("lo", "lo0"):
            os.environ["GLOO_SOCKET_IFNAME"] = name
    torch.set_num_threads(1)
    dist.set_debug_level(dist.DebugLevel.DETAIL if checked else dist.DebugLevel.OFF)

    def meet(number: int) -> bytes:
        store = dist.FileStore(str(folder / f"store-{number}"), num_ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
        return pickle.dumps((None, 1))

    connection.send_bytes(meet(0))
    while True:
        try:
            request = pickle.loads(connection.recv_bytes())
        except EOFError:
            os._exit(0)
        if isinstance(request, int):
            dist.destroy_process_group()
            gc.collect()
            connection.send_bytes(meet(request))
        else:
            connection.send_bytes(_answer(*request))


def _answer(path: list[str], filters: list[tuple[Any, ...]], call: bytes) -> bytes:
    """The pickled pair of the call's value and the number of groups that the rank then is in, or the pickled `RankFailure`."""
    import torch
    from torch.distributed import distributed_c10d

    try:
        # What a call draws without a seed of its own does not depend on the calls before it.
        torch.manual_seed(0)
        sys.path.extend(entry for entry in path if entry not in sys.path)
        function, args = pickle.loads(call)
        with warnings.catch_warnings():
            warnings.resetwarnings()
            for arguments in reversed(filters):
                warnings.filterwarnings(*arguments)
            value = function(*args)
        return pickle.dumps((value, len(distributed_c10d._world.pg_map)))
    except BaseException as error:
        # Everything, SystemExit included: the parent decides what becomes of this process.
        return pickle.dumps(RankFailure(type(error).__name__, str(error), traceback.format_exc()))


def _end_with_parent() -> None:
    """Have the system kill this rank when the fork server ends, also while it is stopped. See `_exit_with_parent`."""
    parent = os.getppid()
    # The fork server lives as long as anyone holds this end of its pipe, and hands it to each child.
    os.close(forkserver._forkserver._forkserver_alive_fd)  # type: ignore[attr-defined]
    if ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) or os.getppid() != parent:
        os._exit(1)


def _exit_with_parent(parent: int) -> None:
    """A rank that waits in a collective cannot see the pipe close, and must not outlive a killed test run.

    The parent is the fork server, which ends with the test run.
    """
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
