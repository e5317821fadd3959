"""Start local ranks, watch them, and pass on how they end. The only place that reads or sets environment variables.

A local run needs no port: the ranks meet in a file, and gloo connects them over loopback alone. The command that
started them holds a pipe to each; ranks whose pipe closes end, so that none outlives a killed command.

Exit codes of a run: see `EXIT_DONE` and the following.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO, NoReturn

from longspan.errors import ConfigError, ExchangeError, LongspanError
from longspan.faults import install_faults, parse_faults

EXIT_DONE = 0
EXIT_FAILED = 1
"""An unexpected failure, or a rank that died."""
EXIT_REFUSED = 2
"""An error that the user can mend: its message says how."""
EXIT_STOPPED = 75
"""Stopped by SIGTERM, SIGINT or SIGHUP after a last checkpoint: ``--resume`` goes on from there. A second signal, and one that
comes before the first step, exits with 128 and its number, without a checkpoint."""

_RENDEZVOUS = "LONGSPAN_RENDEZVOUS"
# For tests alone: see longspan.faults.
_FAULTS = "LONGSPAN_FAULT"
# How often torchrun has started the ranks anew, which it sets.
_ATTEMPT = "TORCHELASTIC_RESTART_COUNT"
# Large CPU tensors in huge pages: else the first touch of every 4 KiB costs long sequences a good part of their time. What the
# user has set stays.
_MEMORY_SETTINGS = {"THP_MEM_ALLOC_ENABLE": "1"}
# After the first rank has failed, the others get this long to say what they saw.
_SECONDS_TO_REPORT = 1.5
# What all ranks of torchrun are refused for rank 0 says: others wait so long to be ended with it, and it lets them come as far.
_SECONDS_FOR_FIRST_RANK = 5.0
_SECONDS_FOR_OTHERS = 2.0
# Ranks that are asked where they are have so long to begin to answer, and have done so when nothing more came for so long.
_SECONDS_FOR_STACKS = 5.0
_SECONDS_TO_WRITE_STACKS = 0.3


def _stop_signals() -> list[signal.Signals]:
    """The signals that end a run; a hang-up only where it is not ignored, as it is under nohup."""
    signals = [signal.SIGTERM, signal.SIGINT]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signals.append(signal.SIGHUP)
    return signals


@dataclass(frozen=True)
class Place:
    """Where this process stands among the ranks of a run.

    `rendezvous` is the folder where ranks of a local run meet and report; None under torchrun, or for a single rank.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    rendezvous: Path | None = None


def place_of_this_process() -> Place | None:
    """This process's place if torchrun or `run_local_ranks` started it, else None.

    Raises:
        ConfigError: for environment variables that give no place.
    """
    if not all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        return None
    world_size = _number_of("WORLD_SIZE", 1, 2**31 - 1)
    rank = _number_of("RANK", 0, world_size - 1)
    local_world_size = _number_of("LOCAL_WORLD_SIZE", 1, world_size) if "LOCAL_WORLD_SIZE" in os.environ else world_size
    local_rank = _number_of("LOCAL_RANK", 0, local_world_size - 1)
    rendezvous = os.environ.get(_RENDEZVOUS)
    if rendezvous is not None and not os.path.isdir(rendezvous):
        raise ConfigError(f"{_RENDEZVOUS} is {rendezvous!r}, which is no folder: only longspan sets it. Unset it")
    return Place(rank, world_size, local_rank, local_world_size, None if rendezvous is None else Path(rendezvous))


def _number_of(name: str, least: int, most: int) -> int:
    """The number in an environment variable that says where a process stands."""
    text = os.environ[name]
    if text.isascii() and text.isdigit() and len(text) < 20 and least <= int(text) <= most:
        return int(text)
    raise ConfigError(
        f"the environment variable {name} is {text!r}; it must be a whole number from {least} to {most}. torchrun sets RANK, "
        "WORLD_SIZE and LOCAL_RANK: start this with torchrun, or unset them to let longspan start its own ranks"
    )


def run_local_ranks(command: Sequence[str], num_ranks: int, threads: int, stopped: str = "stopped") -> int:
    """Run `command`, which calls `run_rank`, on `num_ranks` local ranks of `threads` threads; return the exit code.

    When a rank fails, the others are killed and the first cause is printed. When a signal ends the ranks before they make steps,
    `stopped` is printed.
    """
    with tempfile.TemporaryDirectory(prefix="longspan-") as folder:
        ranks: list[subprocess.Popen[bytes]] = []
        try:
            with forwarded_signals(ranks) as received:
                for rank in range(num_ranks):
                    ranks.append(_start_rank(command, rank, num_ranks, threads, Path(folder)))
                return _watch(ranks, Path(folder), received, stopped)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
                assert process.stdin is not None
                process.stdin.close()


def _start_rank(
    command: Sequence[str], rank: int, num_ranks: int, threads: int, folder: Path, output: BinaryIO | None = None
) -> subprocess.Popen[bytes]:
    place = {
        "RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "OMP_NUM_THREADS": str(threads),
        _RENDEZVOUS: folder.as_posix(),
    }
    environment = _MEMORY_SETTINGS | os.environ | place
    for _, interface in socket.if_nameindex():
        if interface in ("lo", "lo0"):
            environment["GLOO_SOCKET_IFNAME"] = interface
    return subprocess.Popen(
        list(command),
        env=environment,
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=output,
        # Signals of the terminal reach this command alone, which passes them on once.
        start_new_session=True,
    )


def start_job(command: Sequence[str], threads: int, folder: Path, output: BinaryIO) -> subprocess.Popen[bytes]:
    """Start `command`, which calls `run_rank`, as a run of one rank that writes what it says into `output`.

    It ends when this process ends, however that ends.

    Args:
        threads: of its process.
        folder: an empty one of this job alone, where it leaves why it has failed (`failure_of_job`).
    """
    return _start_rank(command, 0, 1, threads, folder, output)


def failure_of_job(folder: Path, code: int | None) -> tuple[str, str]:
    """Why a job that was started with this folder has ended with this exit code, and its traceback, "" if there is none."""
    path = _report(folder, 0)
    report = json.loads(path.read_text()) if path.exists() else {}
    return report.get("message", f"it {how_it_ended(code)}"), report.get("traceback", "")


@contextlib.contextmanager
def forwarded_signals(ranks: list[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """The first signal of `_stop_signals` asks the ranks to stop; the second kills them. Gives the numbers that have come."""
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1:
            for process in ranks:
                process.kill()
            os._exit(128 + number)
        for process in ranks:
            process.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, handle) for number in _stop_signals()}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(ranks: list[subprocess.Popen[bytes]], folder: Path, received: list[int], stopped: str) -> int:
    """Wait until all ranks have ended well, or one has not; received: the signals that have been passed on as SIGTERM."""
    while True:
        codes = [process.poll() for process in ranks]
        if received and any(code in (128 + signal.SIGTERM, -signal.SIGTERM) for code in codes):
            _print_error(stopped)
            return 128 + received[0]
        if any(code not in (None, EXIT_DONE, EXIT_STOPPED) for code in codes):
            return _report_failure(ranks, folder)
        if all(code is not None for code in codes):
            return EXIT_STOPPED if EXIT_STOPPED in codes else EXIT_DONE
        time.sleep(0.05)


def _report_failure(ranks: list[subprocess.Popen[bytes]], folder: Path) -> int:
    """Print the first cause and return the exit code; ranks that have ended by themselves have said what they found."""
    deadline = time.monotonic() + _SECONDS_TO_REPORT
    while time.monotonic() < deadline and any(process.poll() is None for process in ranks):
        time.sleep(0.05)
    codes = [process.poll() for process in ranks]
    reports = {
        rank: json.loads(path.read_text()) for rank in range(len(ranks)) if (path := _report(folder, rank)).exists()
    }
    for rank, code in enumerate(codes):
        if code not in (None, EXIT_DONE, EXIT_STOPPED) and rank not in reports:
            # It ended without a word: whatever the others report is a consequence.
            _print_error(f"rank {rank} of {len(ranks)} {how_it_ended(code)}; the other ranks were stopped")
            return EXIT_FAILED
    failures = [report for report in reports.values() if "found" not in report]
    if not failures:
        return max(int(report["found"]) for report in reports.values())
    first = min(failures, key=lambda report: report["time"])
    if first["refused"]:
        _print_error(first["message"])
        return EXIT_REFUSED
    sys.stderr.write(first["traceback"])
    _print_error(f"rank {first['rank']} of {len(ranks)} failed; the other ranks were stopped. {first['message']}")
    _print_stacks([rank for rank, code in enumerate(codes) if code is None], ranks, folder)
    return EXIT_FAILED


def how_it_ended(code: int | None) -> str:
    """How a process with this exit code ended, as what follows its name."""
    if code is None or code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name if -code in {known.value for known in signal.Signals} else f"signal {-code}"
    hint = " (the system does this when memory runs out)" if name == "SIGKILL" else ""
    return f"was killed by {name}{hint}"


def _print_stacks(late: list[int], ranks: list[subprocess.Popen[bytes]], folder: Path) -> None:
    """Say what the ranks that had not ended were doing: where a deadline has passed, one of them is why."""
    for rank in late:
        wake_to_show_stacks(ranks[rank].pid)
    paths = [_stacks_path(folder, rank) for rank in late]
    stacks = [""] * len(late)
    before: list[str] = []
    deadline = time.monotonic() + _SECONDS_FOR_STACKS
    # On a machine at work an answer takes its time, and is not written in one piece.
    while time.monotonic() < deadline and not (all(stacks) and stacks == before):
        time.sleep(_SECONDS_TO_WRITE_STACKS)
        before, stacks = stacks, [path.read_text(errors="replace") if path.exists() else "" for path in paths]
    for rank, answer in zip(late, stacks, strict=True):
        sys.stderr.write(f"rank {rank} had not ended, and was here:\n{answer.rstrip() or '(no answer)'}\n")


def _print_error(message: str) -> None:
    sys.stderr.write(f"longspan: error: {message}\n")
    sys.stderr.flush()


def _report(folder: Path, rank: int) -> Path:
    return folder / f"failure-{rank}.json"


def _stacks_path(folder: Path, rank: int) -> Path:
    return folder / f"stacks-{rank}.txt"


class StopRequest:
    """Whether a signal has asked this process to stop.

    Once steps are made (`begin_steps`), the first signal of `_stop_signals` sets `requested`, and the second ends the process.
    Before, there is nothing to save, and the first one ends it.

    exit_code: of the process that a signal ends; None is 128 and the signal's number.
    """

    def __init__(self, exit_code: int | None = None) -> None:
        self.requested = False
        self._exit_code = exit_code
        self._makes_steps = False

    def begin_steps(self) -> None:
        """From here on a signal is a request, which is looked at after every step."""
        self._makes_steps = True

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Receive the signals inside this context, on the main thread.

        Python handles a signal on the main thread, and not while that waits in torch for other ranks. Its number goes into a pipe
        at once, however, and a thread of ours reads that.
        """
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        # Without handlers the signals would have their usual effect.
        before = {number: signal.signal(number, lambda *_: None) for number in _stop_signals()}
        descriptor = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        thread = threading.Thread(
            target=self._receive, args=(reader, set(before)), name="longspan-signals", daemon=True
        )
        thread.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(descriptor)
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(writer)
            thread.join()
            os.close(reader)

    def _receive(self, reader: int, numbers: set[signal.Signals]) -> None:
        while received := os.read(reader, 1):
            if received[0] not in numbers:
                continue
            if self.requested or not self._makes_steps:
                os._exit(128 + received[0] if self._exit_code is None else self._exit_code)
            self.requested = True


def run_rank(place: Place, function: Callable[[Place, StopRequest], int]) -> int:
    """Call `function` as one rank and return the exit code; a failure is printed, or left for the starting command."""
    if place.world_size > 1:
        # Where Python was in a crash of torch.
        faulthandler.enable(sys.__stderr__ or sys.stderr)
    if place.rendezvous is not None:
        _end_with_starting_command()
    show_stacks_when_asked(place)
    stop = StopRequest()
    with stop.listening():
        try:
            _install_faults(place)
            code = function(place, stop)
            if code not in (EXIT_DONE, EXIT_STOPPED):
                _leave_report(place, {"found": code})
            has_failed = False
        except Exception as error:
            code = report_failure(place, error)
            has_failed = True
    if place.world_size > 1:
        _leave(code, has_failed)
    return code


def _leave(code: int, has_failed: bool) -> NoReturn:
    """End this process without taking the interpreter down.

    Threads of ours or of torch may be in torch still, or let go of a tensor a moment late: one that asks for the interpreter while
    it shuts down aborts the process ("terminate called without an active exception"), whose work is done.
    """
    if not has_failed:
        # After a failure other ranks may be in a collective that never ends: what is registered here could wait for it.
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


def _install_faults(place: Place) -> None:
    faults = os.environ.get(_FAULTS)
    if faults:
        attempt = os.environ.get(_ATTEMPT, "0")
        install_faults(parse_faults(faults), place.rank, int(attempt) if attempt.isdigit() else 0)


def show_stacks_when_asked(place: Place) -> None:
    """Let `wake_to_show_stacks` show the stacks of this rank's threads, if it is one of several."""
    if place.rendezvous is not None:
        faulthandler.register(signal.SIGUSR1, file=_stacks_path(place.rendezvous, place.rank).open("w"))
    elif place.world_size > 1:
        # Where torchrun collects what ranks say; another rank asks for it, see longspan.train.watch.
        faulthandler.register(signal.SIGUSR1, file=sys.__stderr__ or sys.stderr)


def wake_to_show_stacks(process_id: int) -> None:
    """Ask a rank on this host for the stacks of its threads, even if it is stopped: it answers as it is woken."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(process_id, signal.SIGUSR1)
        os.kill(process_id, signal.SIGCONT)


def report_failure(place: Place, error: Exception) -> int:
    """Print what has failed on this rank, or leave it for the starting command; return the exit code."""
    # An exchange that failed is nothing that was refused before the run: it names where the run stood.
    refused = isinstance(error, LongspanError) and not isinstance(error, ExchangeError)
    where = "; ".join(getattr(error, "__notes__", []))
    message = str(error) if refused else f"{type(error).__name__}: {error}" + (f" [{where}]" if where else "")
    if place.rendezvous is not None:
        report: dict[str, Any] = {
            "time": time.time(),
            "rank": place.rank,
            "refused": refused,
            "message": message,
            "traceback": "".join(traceback.format_exception(error)),
        }
        _leave_report(place, report)
    elif refused and place.rank == 0:
        _print_error(message)
        end_with_first_rank(place)
    elif refused:
        end_with_first_rank(place)
        _print_error(f"rank {place.rank} of {place.world_size}: {message}")
    else:
        traceback.print_exception(error)
        _print_error(message if place.world_size == 1 else f"rank {place.rank} of {place.world_size}: {message}")
    return EXIT_REFUSED if refused else EXIT_FAILED


def _leave_report(place: Place, report: dict[str, Any]) -> None:
    """Tell the command that started local ranks how this one ends."""
    if place.rendezvous is not None:
        path = _report(place.rendezvous, place.rank)
        path.with_suffix(".tmp").write_text(json.dumps(report))
        path.with_suffix(".tmp").replace(path)


def end_with_first_rank(place: Place) -> None:
    """To be called on every rank before it ends because of what all ranks found, which rank 0 has said by now for all of them.

    torchrun ends all ranks as soon as one has ended. Had another one ended before rank 0, nobody might have said anything. So the
    others wait here to be ended, which they are with `EXIT_REFUSED`, as rank 0. This returns on a rank that is not ended, because
    rank 0 goes on: it is refused alone, and says why itself.
    """
    if place.world_size == 1 or place.rendezvous is not None:
        return
    if place.rank == 0:
        time.sleep(_SECONDS_FOR_OTHERS)
        return
    with StopRequest(EXIT_REFUSED).listening():
        time.sleep(_SECONDS_FOR_FIRST_RANK)


def _end_with_starting_command() -> None:
    """End this process when the pipe from the command that started it closes."""

    def wait_for_end() -> None:
        # Not through sys.stdin, whose lock a thread must not hold when the interpreter ends.
        while os.read(0, 1024):
            pass
        os._exit(EXIT_FAILED)

    threading.Thread(target=wait_for_end, daemon=True).start()


def _check_meeting_point() -> None:
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    remedy = "torchrun sets MASTER_ADDR and MASTER_PORT: start this with torchrun, or set them on every rank"
    if not address:
        raise ConfigError(f"the environment variable MASTER_ADDR is {address!r}; it must name rank 0's host. {remedy}")
    if port is None or not (port.isascii() and port.isdigit() and len(port) < 6 and int(port) < 2**16):
        raise ConfigError(f"the environment variable MASTER_PORT is {port!r}; it must be a port, 0 to 65535. {remedy}")


def set_deterministic_environment() -> None:
    """Let cuBLAS compute deterministically, which it reads from the environment when it is first used."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def leave_cores_to_processes() -> None:
    """Let the tokenizers package use no threads of its own, here and in processes started from now on, which share the cores."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def num_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def start_process_group(place: Place, backend: str, timeout_seconds: float) -> None:
    """Join the default process group of a run with several ranks.

    Raises:
        ConfigError: for environment variables that do not say where the ranks meet.
    """
    from datetime import timedelta

    import torch.distributed as dist

    timeout = timedelta(seconds=timeout_seconds)
    if place.rendezvous is not None:
        dist.init_process_group(
            backend,
            init_method=f"file://{place.rendezvous.as_posix()}/store",
            rank=place.rank,
            world_size=place.world_size,
            timeout=timeout,
        )
        return
    _check_meeting_point()
    shared, rank, world_size = next(dist.rendezvous("env://", place.rank, place.world_size, timeout=timeout))
    shared.set_timeout(timeout)
    store = dist.PrefixStore(_name_of_this_start(shared, rank, world_size, timeout_seconds), shared)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def _name_of_this_start(store: Any, rank: int, world_size: int, timeout_seconds: float) -> str:
    """A name that the ranks have in common, and had in no earlier start.

    torchrun's store outlives the ranks that it starts anew: addresses that ranks wrote there before they died are those of nobody.
    A restart has no number that is the same on all hosts. So each rank calls with a word of its own, and rank 0 answers every
    word that it finds, whoever left it, until all have said that they were answered.
    """
    word = secrets.token_hex(8)
    deadline = time.monotonic() + timeout_seconds
    if rank:
        store.set(f"longspan/call/{rank}", word)
        name = str(store.get(f"longspan/answer/{word}").decode())
        store.set(f"longspan/{name}/{rank}", "")
        return name
    missing = set(range(1, world_size))
    answered: set[str] = set()
    while missing:
        for other in sorted(missing):
            if store.check([f"longspan/{word}/{other}"]):
                missing.remove(other)
            elif store.check([f"longspan/call/{other}"]):
                call = str(store.get(f"longspan/call/{other}").decode())
                if call not in answered:
                    store.set(f"longspan/answer/{call}", word)
                    answered.add(call)
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"rank 0 of {world_size} has met {world_size - 1 - len(missing)} of the other ranks after {timeout_seconds:g} s, "
                f"parallel.timeout_seconds. Missing: {', '.join(map(str, sorted(missing)[:8]))}"
            )
        time.sleep(0.01 if missing else 0.0)
    return word
