"""Run a command as ranks on emulated hosts: ``python -m benchmarks.cluster --hosts 4 --rate 1gbit -- COMMAND ...``.

The ranks are started as torchrun starts them, by RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT; gloo
is told the interface, and each host has a name of its own. The hosts share this machine's cores: what is measured is the network's
share of the time, and it is right as long as the cores are not the bottleneck.

The exit code is that of the first rank that failed, 128 + n if signal n ended it; 0 if all ended well. When a rank fails, and on
Ctrl-C and SIGTERM, the others are stopped; the hosts are removed in any case.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.network import Network, NetworkError

_PORT = 29500
# From SIGTERM to SIGKILL.
_SECONDS_TO_END = 10.0


class Cluster:
    """Emulated hosts with `ranks_per_host` ranks each; a context manager.

    rate: of each host's link, as tc writes it (``"1gbit"``); None does not limit it. slow: as in `Network`.

    Raises:
        NetworkError: on entering, where no network can be made.
    """

    def __init__(
        self,
        num_hosts: int,
        rate: str | None = None,
        ranks_per_host: int = 1,
        slow: tuple[int, int, str] | None = None,
    ) -> None:
        if ranks_per_host < 1:
            raise ValueError(f"a host has at least one rank; got ranks_per_host {ranks_per_host}")
        self.network = Network(num_hosts, rate, slow)
        self.ranks_per_host = ranks_per_host
        self.num_ranks = num_hosts * ranks_per_host
        self._num_runs = 0

    def __enter__(self) -> Cluster:
        self.network.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self.network.__exit__(*exception)

    def run(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> int:
        """Run `command` as every rank and return the exit code; `environment` is added to this process's."""
        # A port of its own each time: the last run's may still be closing.
        port = _PORT + self._num_runs
        self._num_runs += 1
        ranks: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(self.num_ranks):
                ranks.append(self._start(rank, command, {**os.environ, **(environment or {})}, port))
            return _first_failure(ranks)
        finally:
            _stop(ranks)

    def _start(
        self, rank: int, command: Sequence[str], environment: dict[str, str], port: int
    ) -> subprocess.Popen[bytes]:
        host, local_rank = divmod(rank, self.ranks_per_host)
        environment.setdefault("OMP_NUM_THREADS", "1")
        # Else every rank warns that the hosts' addresses have no names.
        environment.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        environment |= {
            "RANK": str(rank),
            "WORLD_SIZE": str(self.num_ranks),
            "LOCAL_RANK": str(local_rank),
            "LOCAL_WORLD_SIZE": str(self.ranks_per_host),
            "MASTER_ADDR": self.network.address(0),
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": self.network.interface,
        }
        return subprocess.Popen(
            self.network.command(host, command),
            env=environment,
            stdin=subprocess.DEVNULL,
            # Ctrl-C reaches this command alone, which then ends its ranks.
            start_new_session=True,
        )

    def call(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call a module-level function as every rank, in a gloo group of all of them, and return the values by rank.

        Raises:
            SystemExit: if a rank fails; it has printed why.
        """
        # Loads torch, which a command may do without.
        from benchmarks.harness import MEMORY_SETTINGS

        with tempfile.TemporaryDirectory(prefix="longspan-") as folder:
            (Path(folder) / "call").write_bytes(pickle.dumps((function, args)))
            code = self.run([sys.executable, "-m", "benchmarks.cluster_rank", folder], MEMORY_SETTINGS)
            if code:
                raise SystemExit(f"a rank of {function.__name__} ended with code {code}")
            return [pickle.loads((Path(folder) / f"value-{rank}").read_bytes()) for rank in range(self.num_ranks)]


def _first_failure(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait until a rank has failed or all have ended; the exit code."""
    while True:
        codes = [process.poll() for process in ranks]
        for code in codes:
            if code:
                return code if code > 0 else 128 - code
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.02)


def _stop(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask what still runs to end, and make it end."""
    _signal_all(ranks, signal.SIGTERM)
    deadline = time.monotonic() + _SECONDS_TO_END
    while time.monotonic() < deadline and any(process.poll() is None for process in ranks):
        time.sleep(0.02)
    _signal_all(ranks, signal.SIGKILL)
    for process in ranks:
        process.wait()


def _signal_all(ranks: Sequence[subprocess.Popen[bytes]], number: signal.Signals) -> None:
    for process in ranks:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                # With whatever the command has started.
                os.killpg(process.pid, number)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cluster", description=__doc__.partition("\n")[0])
    parser.add_argument("--hosts", type=int, required=True, help="how many hosts")
    parser.add_argument("--rate", help="of each host's link, each way: 1gbit, 100mbit; no limit without")
    parser.add_argument("--ranks-per-host", type=int, default=1, help="ranks on each host (1)")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND ...", help="what each rank runs")
    arguments = parser.parse_args()
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not command:
        parser.error("give the command that the ranks run after --")
    try:
        with Cluster(arguments.hosts, arguments.rate, arguments.ranks_per_host) as cluster:
            return cluster.run(command)
    except (NetworkError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
