"""Local ranks are started, watched and ended; the first cause of a failure is what is printed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch.distributed as dist

import longspan
from longspan.cli import main
from longspan.errors import ConfigError
from longspan.launch import (
    Place,
    StopRequest,
    _name_of_this_start,
    _print_stacks,
    _stacks_path,
    place_of_this_process,
    run_local_ranks,
    run_rank,
    start_process_group,
)

# The package without what its own file loads: starting and ending ranks needs no torch, which takes seconds to load.
WITHOUT_TORCH = f"""
import sys, types
sys.modules["longspan"] = types.ModuleType("longspan")
sys.modules["longspan"].__path__ = {longspan.__path__!r}
"""

PROLOGUE = f"""
{WITHOUT_TORCH}
import os, sys, time
from longspan.errors import DataError
from longspan.launch import place_of_this_process, run_rank

"""


AFTER_RANK_1 = """
if place.rank == 0:
    while not os.path.exists("{marker}"):
        time.sleep(0.05)
else:
    open("{marker}", "w").close()
"""
"""Rank 0 goes on from here once rank 1 has come here, too: on a busy machine it is otherwise still starting."""


def run(body: str, num_ranks: int = 2) -> int:
    """Run the body of ``function(place, stop)`` on local ranks."""
    function = "def function(place, stop):\n" + textwrap.indent(textwrap.dedent(body), "    ")
    script = f"{PROLOGUE}\n{function}\nsys.exit(run_rank(place_of_this_process(), function))"
    return run_local_ranks([sys.executable, "-c", script], num_ranks, threads=1)


def after_rank_1(folder: Path, body: str) -> str:
    """The body, of which rank 0 begins when rank 1 has."""
    return AFTER_RANK_1.format(marker=folder / "rank-1") + textwrap.dedent(body)


def test_ranks_know_their_place_and_end_well(tmp_path: Path) -> None:
    body = f"""
        with open(f"{tmp_path}/{{place.rank}}", "w") as file:
            interface = os.environ["GLOO_SOCKET_IFNAME"]
            file.write(f"{{place.world_size}} {{place.local_rank}} {{interface}} {{os.environ['OMP_NUM_THREADS']}}")
        return 0
    """
    assert run(body, num_ranks=3) == 0
    assert [(tmp_path / str(rank)).read_text() for rank in range(3)] == [f"3 {rank} lo 1" for rank in range(3)]


def test_the_first_cause_is_printed_and_not_its_consequences(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    body = """
        if place.rank == 0:
            time.sleep(0.5)
            raise ConnectionError("rank 1 has gone")
        error = RuntimeError("the cause")
        error.add_note("while testing")
        raise error
    """
    assert run(after_rank_1(tmp_path, body)) == 1
    errors = capfd.readouterr().err
    assert "rank 1 of 2 failed; the other ranks were stopped. RuntimeError: the cause [while testing]" in errors
    assert "in function" in errors
    assert "has gone" not in errors


def test_what_the_user_can_mend_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    assert run("raise DataError('no text. Give more')") == 2
    assert capfd.readouterr().err == "longspan: error: no text. Give more\n"


@pytest.mark.slow_rows(r"^1$")
@pytest.mark.parametrize("code", [1, 2])
def test_ranks_that_find_something_wrong_end_with_their_own_code(code: int, capfd: pytest.CaptureFixture[str]) -> None:
    """They have said what it is, and none of them has died."""
    assert run(f"return {code}") == code
    assert capfd.readouterr().err == ""


# A process with work under way ends in make test, in `tests/comm/test_background.py`.
@pytest.mark.slow
def test_a_rank_whose_work_is_done_ends_well_though_a_thread_is_in_torch(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """While the interpreter shuts down, that thread would abort the process; what is registered for the end of one still runs."""
    body = f"""
        import atexit, threading, torch
        def multiply():
            matrix = torch.eye(256)
            while True:
                matrix = matrix @ matrix
        threading.Thread(target=multiply, daemon=True).start()
        atexit.register(lambda: open(f"{tmp_path}/{{place.rank}}", "w").close())
        print("the last line", end="")
        time.sleep(0.2)
        return 0
    """
    assert run(body) == 0
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("the last line" * 2, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


def test_a_rank_that_never_ends_shows_where_it_is_and_is_killed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    body = """
        if place.rank == 1:
            def waits_for_ever():
                time.sleep(1000)
            waits_for_ever()
        time.sleep(0.3)
        raise RuntimeError("timed out")
    """
    assert run(after_rank_1(tmp_path, body)) == 1
    errors = capfd.readouterr().err
    assert "rank 1 had not ended, and was here:" in errors
    assert "in waits_for_ever" in errors


def test_stacks_are_waited_for_until_they_are_all_there(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A rank on a machine at work begins late and writes in pieces; one that never answers takes nothing from the others."""
    rank = """
        import signal, sys, time
        def answer(number, frame):
            if len(sys.argv) == 1:
                return
            time.sleep(1.0)
            with open(sys.argv[1], "w", buffering=1) as file:
                file.write("the first thread\\n")
                time.sleep(0.1)
                file.write("the second thread\\n")
        signal.signal(signal.SIGUSR1, answer)
        print("ready", flush=True)
        time.sleep(60)
    """
    processes = [
        subprocess.Popen([sys.executable, "-c", textwrap.dedent(rank), *answer], stdout=subprocess.PIPE)
        for answer in ([], [str(_stacks_path(tmp_path, 1))])
    ]
    try:
        for process in processes:
            assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        _print_stacks([0, 1], processes, tmp_path)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert capfd.readouterr().err == (
        "rank 0 had not ended, and was here:\n(no answer)\n"
        "rank 1 had not ended, and was here:\nthe first thread\nthe second thread\n"
    )


@pytest.mark.parametrize(
    ("ending", "message"),
    [
        pytest.param("os._exit(7)", "rank 1 of 2 ended with exit code 7", marks=pytest.mark.slow),
        pytest.param("os.abort()", "rank 1 of 2 was killed by SIGABRT", marks=pytest.mark.slow),
        pytest.param("os.abort()", "in function", marks=pytest.mark.slow),
        ("os.kill(os.getpid(), 9)", "rank 1 of 2 was killed by SIGKILL (the system does this when memory runs out)"),
    ],
)
def test_a_rank_that_dies_without_a_word_is_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], ending: str, message: str
) -> None:
    body = f"""
        if place.rank == 1:
            {ending}
        time.sleep(0.3)
        raise ConnectionError("a consequence")
    """
    assert run(after_rank_1(tmp_path, body)) == 1
    assert message in capfd.readouterr().err


@pytest.mark.slow
def test_ranks_that_a_signal_stops_say_no_more_than_that(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What a training run adds, that nothing was saved, would be odd for another command."""
    body = """
        if place.rank == 0:
            os.kill(os.getppid(), 15)
        time.sleep(60)
    """
    assert run(after_rank_1(tmp_path, body)) == 128 + signal.SIGTERM
    assert capfd.readouterr().err == "longspan: error: stopped\n"


def test_a_process_that_no_launcher_started_has_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "3")
    assert place_of_this_process() is None
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert place_of_this_process() == Place(3, 8, 1, 2)


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"])
@pytest.mark.parametrize("value", ["", " ", "two", "1.0", "-1", "٣", "99999999999", "9" * 5000, "\udcff"])
def test_a_place_that_is_no_number_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, value: str
) -> None:
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"} | {name: value}
    for key, text in place.items():
        monkeypatch.setenv(key, text)
    with pytest.raises(ConfigError, match=f"the environment variable {name} is .*must be a whole number from"):
        place_of_this_process()
    for command in (["train"], ["bench", "exchange"]):
        assert main(command) == 2
        assert capsys.readouterr().err.startswith(f"longspan: error: the environment variable {name} is")


@pytest.mark.parametrize(
    ("name", "value"),
    [("MASTER_ADDR", None), ("MASTER_ADDR", ""), ("MASTER_PORT", None), ("MASTER_PORT", "x"), ("MASTER_PORT", "70000")],
)
def test_a_meeting_point_that_is_none_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str | None
) -> None:
    for key, text in {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500", name: value}.items():
        if text is None:
            monkeypatch.delenv(key, raising=False)
        else:
            monkeypatch.setenv(key, text)
    with pytest.raises(ConfigError, match=f"the environment variable {name} is .*start this with torchrun"):
        start_process_group(Place(world_size=2), "gloo", 1.0)


def test_ranks_that_are_started_anew_meet_in_the_store_of_those_that_died() -> None:
    """Rank 1 called and died, rank 2 was answered and died, rank 0 died before it knew."""
    store = dist.HashStore()
    store.set("longspan/call/1", "dead")
    store.set("longspan/call/2", "dead too")
    store.set("longspan/answer/dead too", "a name of before")
    store.set("longspan/a name of before/2", "")
    names = []
    for _ in range(2):
        with ThreadPoolExecutor(3) as threads:
            found = set(threads.map(lambda rank: _name_of_this_start(store, rank, 3, 60.0), (2, 0, 1)))
        assert len(found) == 1
        names.append(found.pop())
    assert len({*names, "a name of before"}) == 3


def test_rank_0_says_who_did_not_come() -> None:
    with pytest.raises(TimeoutError, match=r"rank 0 of 3 has met 0 of the other ranks after 0.1 s.*Missing: 1, 2"):
        _name_of_this_start(dist.HashStore(), 0, 3, 0.1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_asks_for_the_end(number: signal.Signals) -> None:
    stop = StopRequest()
    with stop.listening():
        stop.begin_steps()
        os.kill(os.getpid(), number)
        deadline = time.monotonic() + 60
        while not stop.requested:
            assert time.monotonic() < deadline
            time.sleep(0.01)


BLOCKED = """
{without_torch}
import ctypes, sys
from longspan.launch import Place, run_rank

def function(place, stop):
    if {makes_steps}:
        stop.begin_steps()
    print("waiting", flush=True)
    # As in a collective that waits for another rank: the main thread is outside of Python, where it handles no signal.
    mutex = ctypes.create_string_buffer(128)
    while True:
        ctypes.CDLL(None).pthread_mutex_lock(mutex)

sys.exit(run_rank(Place(), function))
"""


@pytest.mark.slow_rows(r"^True-2")
@pytest.mark.parametrize(("makes_steps", "num_signals"), [(False, 1), (True, 2)])
def test_a_signal_reaches_a_process_that_waits_for_other_ranks(makes_steps: bool, num_signals: int) -> None:
    script = BLOCKED.format(without_torch=WITHOUT_TORCH, makes_steps=makes_steps)
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        for sent in range(num_signals):
            assert process.poll() is None, f"it has ended after {sent} signals"
            process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
        assert process.wait(timeout=20) == 128 + signal.SIGTERM


def test_a_hang_up_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = StopRequest()
        with stop.listening():
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_failure_of_a_single_process_is_printed_by_itself(capsys: pytest.CaptureFixture[str]) -> None:
    def function(place: Place, stop: StopRequest) -> int:
        raise RuntimeError("the cause")

    assert run_rank(Place(), function) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("Traceback")
    assert errors.endswith("longspan: error: RuntimeError: the cause\n")
