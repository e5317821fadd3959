"""An emulated cluster gives each rank its place and each link its rate, and leaves nothing behind however it ends."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from benchmarks import cluster, network
from benchmarks.cluster import Cluster
from benchmarks.network import Network, NetworkError, bits_per_second, why_unavailable

_UNAVAILABLE = why_unavailable()
needs_network = pytest.mark.skipif(_UNAVAILABLE is not None, reason=str(_UNAVAILABLE))


@pytest.fixture(autouse=True)
def one_test_at_a_time(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """They look at all networks of the machine, and several processes may share the tests."""
    with (tmp_path_factory.getbasetemp().parent / "networks.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def namespaces() -> set[str]:
    folder = Path("/run/netns")
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def is_running(marker: str) -> bool:
    """Whether a process has `marker` on its command line."""
    return any(marker.encode() in path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if _readable(path))


def _readable(path: Path) -> bool:
    try:
        path.read_bytes()
    except OSError:
        return False
    return True


@pytest.fixture
def left_behind() -> set[str]:
    """Namespaces that were there before."""
    return namespaces()


@needs_network
def test_each_rank_is_told_its_place_and_the_name_of_its_host(tmp_path: Path) -> None:
    names = "$WORLD_SIZE $LOCAL_RANK $LOCAL_WORLD_SIZE $MASTER_ADDR $GLOO_SOCKET_IFNAME $MINE $(hostname)"
    with Cluster(2, ranks_per_host=2) as made:
        assert made.run(["sh", "-c", f"echo {names} > {tmp_path}/$RANK"], {"MINE": "here"}) == 0
        hosts = made.network.hosts
    assert len(set(hosts)) == 2
    for rank in range(4):
        told = (tmp_path / str(rank)).read_text().split()
        assert told == ["4", str(rank % 2), "2", "10.0.0.1", "eth0", "here", hosts[rank // 2]]


def _talk(rate: int, num_bytes: int) -> tuple[str, float, float]:
    """Name of the host, the sum of all ranks' numbers, and the seconds that a message from rank 0 to rank 1 took, over the fewest
    that the rate allows."""
    total = torch.tensor([float(dist.get_rank())])
    dist.all_reduce(total)
    message = torch.zeros(num_bytes, dtype=torch.uint8)
    begun = time.perf_counter()
    if dist.get_rank() == 0:
        dist.send(message, 1)
    else:
        dist.recv(message, 0)
    dist.barrier()
    return socket.gethostname(), float(total), (time.perf_counter() - begun) / (8 * num_bytes / rate)


# That both ends are limited runs in make test, below.
@pytest.mark.slow
@needs_network
def test_ranks_on_different_hosts_compute_together_at_no_more_than_the_rate() -> None:
    with Cluster(2, "40mbit") as made:
        values = made.call(_talk, 40_000_000, 2_000_000)
        assert [name for name, _, _ in values] == made.network.hosts
    assert [total for _, total, _ in values] == [1.0, 1.0]
    # A link that has been idle lets 16 KiB through at once: 1 % of this message.
    assert all(times >= 0.98 for _, _, times in values)


def _raise_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise RuntimeError("as asked")
    dist.barrier()


# How ranks end that fail is shown by commands below.
@pytest.mark.slow
@needs_network
def test_a_function_that_fails_on_a_rank_ends_the_call(left_behind: set[str]) -> None:
    with pytest.raises(SystemExit, match="_raise_on_rank_1 ended with code"), Cluster(2) as made:
        made.call(_raise_on_rank_1)
    assert namespaces() == left_behind


@needs_network
def test_both_ends_of_every_link_are_limited() -> None:
    with Network(3, "100mbit") as made:
        for namespace, interfaces in [
            *((host, ["eth0"]) for host in made.hosts),
            (made.hosts[0].replace("host0", "bridge"), ["port0", "port1", "port2"]),
        ]:
            for interface in interfaces:
                shown = subprocess.run(
                    ["tc", "-n", namespace, "qdisc", "show", "dev", interface],
                    capture_output=True,
                    text=True,
                    check=True,
                ).stdout
                assert "tbf" in shown and "rate 100Mbit" in shown


@pytest.mark.parametrize(
    ("rate", "bits"), [("1gbit", 10**9), ("2.5Gbit", 25 * 10**8), ("100mbit", 10**8), ("9kbit", 9000)]
)
def test_rates_are_written_as_tc_writes_them(rate: str, bits: int) -> None:
    assert bits_per_second(rate) == bits


@pytest.mark.parametrize("rate", ["", "1", "gbit", "1 gbit", "-1gbit", "1gbyte", "0mbit"])
def test_what_is_no_rate_is_refused(rate: str) -> None:
    with pytest.raises(ValueError, match="Write 1gbit"):
        Network(1, rate)


@pytest.mark.slow
@needs_network
def test_two_hosts_may_have_a_slow_link_between_them() -> None:
    """What they send each other takes no less than it says; all else keeps the rate."""
    with Cluster(3, "100mbit", slow=(0, 2, "5mbit")) as made:
        for one, other in ((0, 2), (2, 0)):
            # A quarter of a mebibyte takes 0.42 s, less what an idle link lets through at once; at the rate of the others 0.02 s.
            assert made.call(seconds_to, one, other)[one] > 0.3
        for host, limits in enumerate((["100Mbit", "5Mbit"], [], ["100Mbit", "5Mbit"])):
            command = ["tc", "-n", made.network.hosts[host], "class", "show", "dev", "eth0"]
            shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            assert [f"rate {limit}" in shown for limit in limits] == [True] * len(limits)
            assert ("class htb" in shown) == bool(limits)


def seconds_to(one: int, other: int) -> float:
    """Shortest of three times of a quarter of a mebibyte from one rank to another, and a word back, as the sender sees it."""
    x, word = torch.zeros(2**16), torch.zeros(1)
    times = []
    for _ in range(3):
        dist.barrier()
        begun = time.perf_counter()
        if dist.get_rank() == one:
            dist.send(x, other)
            dist.recv(word, other)
        elif dist.get_rank() == other:
            dist.recv(x, one)
            dist.send(word, one)
        times.append(time.perf_counter() - begun)
    return min(times)


@pytest.mark.parametrize("slow", [(0, 0, "1mbit"), (0, 3, "1mbit"), (0, 1, "1gbit"), (0, 1, "2gbit")])
def test_what_is_no_slow_link_is_refused(slow: tuple[int, int, str]) -> None:
    with pytest.raises(
        ValueError, match=r"a slow link (lies between two of hosts 0 to 2|is slower than the others); got"
    ):
        Network(3, "1gbit", slow)


@pytest.mark.parametrize("num_hosts", [0, 251])
def test_a_network_of_no_hosts_or_too_many_is_refused(num_hosts: int) -> None:
    with pytest.raises(ValueError, match="1 to 250 hosts"):
        Network(num_hosts)


@needs_network
@pytest.mark.parametrize(("command", "code"), [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 137)])
def test_the_exit_code_is_that_of_the_rank_that_failed_and_the_others_are_stopped(
    left_behind: set[str], command: str, code: int
) -> None:
    marker = f"10{os.getpid()}"
    others = "true" if code == 0 else f"sleep {marker}"
    command = f'if [ "$RANK" = 1 ]; then {command}; else {others}; fi'
    arguments = ["--hosts", "2", "--", "sh", "-c", command]
    done = subprocess.run([sys.executable, "-m", "benchmarks.cluster", *arguments], check=False)
    assert done.returncode == code
    assert namespaces() == left_behind
    assert not is_running(f"sleep\0{marker}")


@needs_network
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_ranks_and_removes_the_hosts(
    left_behind: set[str], tmp_path: Path, number: signal.Signals
) -> None:
    marker = f"20{os.getpid()}"
    arguments = ["--hosts", "2", "--", "sh", "-c", f"touch {tmp_path}/$RANK; sleep {marker}"]
    # A shell lets what it starts in the background ignore interrupts, and children inherit that.
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.cluster", *arguments],
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    while len(list(tmp_path.iterdir())) < 2:
        time.sleep(0.02)
        assert process.poll() is None
    process.send_signal(number)
    assert process.wait() == 128 + number
    assert namespaces() == left_behind
    assert not is_running(f"sleep\0{marker}")


@needs_network
def test_a_signal_while_the_hosts_are_made_leaves_nothing(left_behind: set[str], tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.cluster", "--hosts", "40", "--", "touch", str(tmp_path / "ran")]
    )
    while namespaces() == left_behind:
        time.sleep(0.002)
        assert process.poll() is None
    process.terminate()
    assert process.wait() == 143
    assert namespaces() == left_behind
    assert not (tmp_path / "ran").exists()


@needs_network
def test_what_a_rank_leaves_running_ends_with_its_host() -> None:
    marker = f"30{os.getpid()}"
    with Cluster(1) as made:
        assert made.run(["sh", "-c", f"setsid sleep {marker} &"]) == 0
    assert not is_running(f"sleep\0{marker}")


@needs_network
def test_clusters_side_by_side_do_not_touch_each_other(left_behind: set[str]) -> None:
    with Network(1) as first:
        with Network(1) as second:
            pass
        assert namespaces() - left_behind == {*first.hosts, first.hosts[0].replace("host0", "bridge")}
        assert not set(second.hosts) & namespaces()
        first.remove()
        first.remove()
    assert namespaces() == left_behind


def _refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr(sys, "argv", ["cluster", "--hosts", "1", "--", "true"])
    with pytest.raises(SystemExit) as ended:
        cluster.main()
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_without_root_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "needs root" in _refusal(monkeypatch, capsys)


def test_without_the_commands_it_names_the_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda command: None if command == "tc" else f"/sbin/{command}")
    assert "`tc`: install iproute2" in _refusal(monkeypatch, capsys)


@needs_network
def test_what_the_system_refuses_is_shown_and_undone(left_behind: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "_MIN_BURST_BYTES", -1)
    monkeypatch.setattr(network, "_BURST_SECONDS", 0.0)
    with pytest.raises(NetworkError, match=r"tc -n .* burst 0b"), Network(1, "1gbit"):
        pass
    assert namespaces() == left_behind
