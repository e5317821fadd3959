"""Hosts of one machine, with links of a given rate between them: network namespaces, a bridge, and ``tc tbf``. Linux, root.

    host 0: eth0 ----- port0 \\
    host 1: eth0 ----- port1 -- bridge (a namespace of its own)
    ...

Each host is a network namespace, joined to the bridge by a pair of virtual interfaces. A token bucket at both ends of the pair
limits what a host sends and what it receives to the rate, each way at the same time: a full-duplex link to a switch that is fast
enough for all. What processes of one host send each other does not pass the link. The root namespace is left alone.

One link may be slower than the others: what two hosts send each other is then limited further, by a class of its own (``tc htb``)
where it leaves them.

Latency is what the kernel takes, some tens of microseconds: it is not emulated.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

_UNITS = {"k": 10**3, "m": 10**6, "g": 10**9}
# What a link that has been idle lets through at once. Less, and the kernel's timer does not keep the bucket full; more, and short
# messages do not see the rate at all. Measured: gloo messages of 1 to 16 MiB reach 0.96 to 0.97 of 1 Gbit/s.
_BURST_SECONDS = 0.75e-3
_MIN_BURST_BYTES = 16 * 1024
# Long enough that nothing is dropped, as on a network with flow control: a lost packet costs TCP 200 ms.
_QUEUE_BYTES = 64 * 2**20
_MAX_HOSTS = 250


class NetworkError(RuntimeError):
    """The network cannot be made here; the message says why."""


def bits_per_second(rate: str) -> int:
    """The number that a rate as tc writes it stands for: ``"1gbit"``, ``"2.5gbit"``, ``"100mbit"``.

    Raises:
        ValueError: for anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg])bit", rate.lower())
    bits = 0 if match is None else round(float(match[1]) * _UNITS[match[2]])
    if bits < 1000:
        raise ValueError(f"a rate is a number and kbit, mbit or gbit, of at least 1kbit; got {rate!r}. Write 1gbit")
    return bits


class Network:
    """Hosts and their links; a context manager that removes exactly what it has made.

    num_hosts: up to 250. rate: of each host's link, each way; None does not limit it. slow: two hosts and the rate of what they
    send each other, less than `rate`; None is no such pair.
    """

    def __init__(self, num_hosts: int, rate: str | None = None, slow: tuple[int, int, str] | None = None) -> None:
        if not 1 <= num_hosts <= _MAX_HOSTS:
            raise ValueError(f"a network has 1 to {_MAX_HOSTS} hosts; got {num_hosts}")
        self.num_hosts = num_hosts
        self.rate = None if rate is None else bits_per_second(rate)
        self._slow_rate = 0
        self._slow_hosts: tuple[int, int] | None = None
        if slow is not None:
            one, other, slow_rate = slow
            self._slow_hosts, self._slow_rate = (one, other), bits_per_second(slow_rate)
            if one == other or not {one, other} <= set(range(num_hosts)):
                raise ValueError(f"a slow link lies between two of hosts 0 to {num_hosts - 1}; got {one} and {other}")
            if self.rate is None or self._slow_rate >= self.rate:
                raise ValueError(f"a slow link is slower than the others; got {slow_rate} beside {rate}")
        tag = f"longspan-{secrets.token_hex(4)}"
        self._bridge = f"{tag}-bridge"
        self.hosts = [f"{tag}-host{host}" for host in range(num_hosts)]
        """Names of the hosts, of their namespaces and what `hostname` says in them."""

    interface = "eth0"

    def address(self, host: int) -> str:
        """The IPv4 address of a host."""
        return f"10.0.0.{host + 1}"

    def command(self, host: int, command: Sequence[str]) -> list[str]:
        """What runs `command` on a host, under the host's own name. It is the same process all along: signals reach it."""
        named = 'echo "$0" > /proc/sys/kernel/hostname && exec "$@"'
        name = self.hosts[host]
        return ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", named, name, *command]

    def __enter__(self) -> Network:
        reason = _missing()
        if reason is not None:
            raise NetworkError(reason)
        with contextlib.ExitStack() as stack:
            stack.enter_context(_termination_raises())
            stack.callback(self.remove)
            # A signal that arrives meanwhile is delivered after: nothing that was made is forgotten.
            with _signals_held():
                self._make()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _make(self) -> None:
        _run("ip", "netns", "add", self._bridge)
        _run("ip", "-n", self._bridge, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", self._bridge, "link", "set", "bridge", "addrgenmode", "none", "up")
        for host, name in enumerate(self.hosts):
            port = f"port{host}"
            pair = ("name", self.interface, "netns", name)
            _run("ip", "netns", "add", name)
            _run("ip", "-n", self._bridge, "link", "add", port, "type", "veth", "peer", *pair)
            _run("ip", "-n", self._bridge, "link", "set", port, "master", "bridge", "addrgenmode", "none", "up")
            _run("ip", "-n", name, "address", "add", f"{self.address(host)}/24", "dev", self.interface)
            # Without an IPv6 address: gloo takes whichever it finds first.
            _run("ip", "-n", name, "link", "set", self.interface, "addrgenmode", "none", "up")
            _run("ip", "-n", name, "link", "set", "lo", "up")
            self._limit(self._bridge, port)
            if self._slow_hosts is not None and host in self._slow_hosts:
                self._limit_by_target(name, sum(self._slow_hosts) - host)
            else:
                self._limit(name, self.interface)

    def _limit_by_target(self, namespace: str, other: int) -> None:
        """Limit what leaves a host, and more what goes to another one."""
        assert self.rate is not None
        device = ("dev", self.interface)
        # Without a class of its own nothing leaves; r2q keeps the shares between classes of very unequal rates in range.
        _run(
            "tc",
            "-n",
            namespace,
            "qdisc",
            "add",
            *device,
            "root",
            "handle",
            "1:",
            "htb",
            "default",
            "10",
            "r2q",
            "1000",
        )
        for minor, rate in ((10, self.rate), (20, self._slow_rate)):
            burst = f"{max(_MIN_BURST_BYTES, round(rate / 8 * _BURST_SECONDS))}b"
            limits = ("rate", f"{rate}bit", "burst", burst, "cburst", burst, "quantum", "3000")
            _run(
                "tc", "-n", namespace, "class", "add", *device, "parent", "1:", "classid", f"1:{minor}", "htb", *limits
            )
            queue = ("parent", f"1:{minor}", "handle", f"{minor}:", "bfifo", "limit", f"{_QUEUE_BYTES}b")
            _run("tc", "-n", namespace, "qdisc", "add", *device, *queue)
        match = ("u32", "match", "ip", "dst", f"{self.address(other)}/32", "flowid", "1:20")
        _run("tc", "-n", namespace, "filter", "add", *device, "parent", "1:", "protocol", "ip", "prio", "1", *match)

    def _limit(self, namespace: str, interface: str) -> None:
        """Limit what leaves an interface."""
        if self.rate is None:
            return
        burst = max(_MIN_BURST_BYTES, round(self.rate / 8 * _BURST_SECONDS))
        bucket = ("rate", f"{self.rate}bit", "burst", f"{burst}b", "limit", f"{_QUEUE_BYTES}b")
        _run("tc", "-n", namespace, "qdisc", "add", "dev", interface, "root", "tbf", *bucket)

    def remove(self) -> None:
        """Kill what still runs on the hosts and remove them; may be called again."""
        with _signals_held():
            for name in [*self.hosts, self._bridge]:
                if (Path("/run/netns") / name).exists():
                    _kill_all(name)
                    # The interfaces go with the namespace.
                    _call("ip", "netns", "delete", name)


def why_unavailable() -> str | None:
    """Why no network can be made here, or None where one can: tried on a single host."""
    try:
        with Network(1, "1gbit"):
            return None
    except NetworkError as error:
        return str(error)


def _missing() -> str | None:
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "an emulated network needs root on Linux, to make network namespaces. Run it with sudo, or in a virtual machine"
    for command, package in (("ip", "iproute2"), ("tc", "iproute2"), ("unshare", "util-linux")):
        if shutil.which(command) is None:
            return f"an emulated network needs the command `{command}`: install {package}"
    return None


def _run(*command: str) -> None:
    done = _call(*command)
    if done.returncode:
        what = done.stderr.strip() or f"exit code {done.returncode}"
        raise NetworkError(f"this system does not let an emulated network be made: `{' '.join(command)}`: {what}")


def _call(*command: str) -> subprocess.CompletedProcess[str]:
    # In a session of its own: Ctrl-C must not end it half-way.
    return subprocess.run(command, capture_output=True, text=True, check=False, start_new_session=True)


def _kill_all(namespace: str) -> None:
    for _ in range(100):
        running = _call("ip", "netns", "pids", namespace).stdout.split()
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)
        if not running:
            return
        time.sleep(0.02)


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Deliver SIGINT and SIGTERM after the block; a second one in it changes nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    # By handlers, not by a mask: threads of torch would take what this one masks.
    with _handlers(dict.fromkeys((signal.SIGINT, signal.SIGTERM), lambda number, _: received.append(number))):
        yield
    for number in received[:1]:
        signal.raise_signal(number)


@contextlib.contextmanager
def _handlers(handlers: Mapping[signal.Signals, Callable[[int, FrameType | None], object]]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


@contextlib.contextmanager
def _termination_raises() -> Iterator[None]:
    """SIGTERM ends the process by an exception, so that what stands behind is still done."""
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with _handlers({signal.SIGTERM: _end} if ours else {}):
        yield
