"""Timing in pairs, in one run, with the spread; peak memory; local ranks; tables."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


@dataclass(frozen=True)
class Ratio:
    """Ratios of two sides timed in turn: median, and the range of the pairs."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return self.rounded(2)

    def rounded(self, digits: int) -> str:
        """Median and range with that many decimals."""
        return f"{self.median:.{digits}f} ({self.low:.{digits}f}-{self.high:.{digits}f})"


@dataclass(frozen=True)
class Paired:
    """Seconds of two sides (medians), and the ratio first / second pair by pair."""

    first: float
    second: float
    ratio: Ratio

    def cells(self, digits: int = 0, *, second_first: bool = False) -> tuple[str, str, Ratio]:
        """Of a table's row: milliseconds of the sides, and the ratio."""
        first, second = (f"{seconds * 1e3:.{digits}f}" for seconds in (self.first, self.second))
        return (second, first, self.ratio) if second_first else (first, second, self.ratio)


@dataclass
class Table:
    """One table of figures, with what was asked of them."""

    name: str
    title: str
    target: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)

    def add(self, *cells: object) -> None:
        """Add a row, and say it: a table may take an hour."""
        self.rows.append([str(cell) for cell in cells])
        say(f"{self.name}: " + " | ".join(self.rows[-1]))

    def markdown(self) -> str:
        lines = [f"### {self.title}", "", f"Asked for: {self.target}", ""]
        lines += ["| " + " | ".join(self.columns) + " |", "|" + "---|" * len(self.columns)]
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        return "\n".join(lines) + "\n"


def say(text: str) -> None:
    """How far a long measurement is, on standard error, beside what it prints at its end."""
    print(text, file=sys.stderr, flush=True)


def seconds(function: Callable[[], Any]) -> float:
    """Wall time of one call."""
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def timed_pairs(first: Callable[[], Any], second: Callable[[], Any], pairs: int) -> Paired:
    """Time two sides in turn, after one untimed call of each; the order within a pair alternates."""
    first()
    second()
    firsts, seconds_ = [], []
    for index in range(pairs):
        if index % 2:
            seconds_.append(seconds(second))
            firsts.append(seconds(first))
        else:
            firsts.append(seconds(first))
            seconds_.append(seconds(second))
    return paired(firsts, seconds_)


def paired(firsts: Sequence[float], seconds_: Sequence[float]) -> Paired:
    """Medians of two sides and of their ratios, from times taken in turn."""
    ratios = sorted(a / b for a, b in zip(firsts, seconds_, strict=True))
    ratio = Ratio(statistics.median(ratios), ratios[0], ratios[-1])
    return Paired(statistics.median(firsts), statistics.median(seconds_), ratio)


def seconds_of_slowest(function: Callable[[], Any]) -> float:
    """Wall time of a call that all ranks begin together, of the slowest of them; the same on every rank."""
    dist.barrier()
    elapsed = torch.tensor([seconds(function)], dtype=torch.float64)
    dist.all_reduce(elapsed, dist.ReduceOp.MAX)
    return float(elapsed)


def timed_alone_and_together(alone: Callable[[], Any], *together: Callable[[], Any], rounds: int) -> list[list[float]]:
    """Times of rank 0 by itself, and of all ranks at each of `together`, in turn. Elsewhere the first list is empty.

    An untimed call precedes each: a step of training follows one of its kind, and the first after another kind pays for memory
    that is touched anew.
    """
    alones: list[float] = []
    togethers: list[list[float]] = [[] for _ in together]
    for _ in range(rounds):
        dist.barrier()
        if dist.get_rank() == 0:
            alone()
            alones.append(seconds(alone))
        for function, times in zip(together, togethers, strict=True):
            dist.barrier()
            function()
            times.append(seconds_of_slowest(function))
    return [alones, *togethers]


BESIDE_ONE_RANK = [
    "ms, two ranks",
    "ms, one rank",
    "times as fast",
    "ms, one rank, other core busy",
    "times as fast, both cores busy",
    "least ms, two ranks",
    "least ms, one rank",
    "times as fast, least",
]
"""Columns of a table: what `beside_one_rank` has of a row."""


def beside_one_rank(together: Sequence[float], alone: Sequence[float], busy: Sequence[float]) -> tuple[object, ...]:
    """Of a table's row: two ranks beside one rank whose other core is idle, and beside one whose other core is at work as well.

    Medians, and of the first two the least time of each: what a step takes when nothing else has the processor, as other programs,
    or other guests of the same machine, only ever add to it.

    Args:
        together, alone, busy: seconds taken in turn, of both ranks on a sequence that they share, of one rank on the whole of it,
            and of each rank on a whole one of its own.
    """
    over_idle, over_busy = paired(alone, together), paired(busy, together)
    busy_ms, _, ratio = over_busy.cells()
    least = tuple(f"{min(times) * 1e3:.0f}" for times in (together, alone))
    return (*over_idle.cells(second_first=True), busy_ms, ratio, *least, least_ratio(alone, together))


def least_ratio(firsts: Sequence[float], seconds_: Sequence[float]) -> str:
    """The least time of one side over that of the other."""
    return f"{min(firsts) / min(seconds_):.2f}"


def require_close(what: str, got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Refuse to report a side whose result is wrong: error relative to the largest expected value."""
    error = float(
        (got.detach().double() - expected.detach().double()).abs().max() / expected.detach().double().abs().max()
    )
    if not error <= tolerance:
        raise SystemExit(f"{what}: relative error {error:.2e} exceeds {tolerance:.0e}; no figure is reported")


def peak_bytes(function: Callable[[], Any]) -> int:
    """Growth of the process's peak resident memory over its resident memory now, while `function` runs (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    function()
    return _status_bytes("VmHWM") - before


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{key} is not in /proc/self/status")


MEMORY_SETTINGS = {"THP_MEM_ALLOC_ENABLE": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}


def reexecute_with_memory_settings(module: str = "benchmarks") -> None:
    """Start this program, `module`, again with large CPU tensors in huge pages, and freed memory kept.

    Without, a process gives every large block back and takes it anew, page by page, and whoever allocates most is timed for that.
    The variables are read when a process starts, so that they cannot be set later.
    """
    if any(os.environ.get(name) != value for name, value in MEMORY_SETTINGS.items()):
        os.environ.update(MEMORY_SETTINGS)
        os.execv(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]])


@contextmanager
def freed_memory_is_returned() -> Iterator[None]:
    """Processes started meanwhile give freed tensors back at once: their resident memory is that of what lives.

    With the settings of timing, freed blocks stay, and one more is counted for every one that fits in none of them.
    """
    before = dict(os.environ)
    for name in MEMORY_SETTINGS:
        os.environ.pop(name, None)
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**17)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def in_subprocess(function: Callable[..., Any], *args: Any) -> Any:
    """Run a module-level function in a fresh process with one thread; its memory starts clean."""
    return run_ranks(1, _without_group, function, args, with_group=False)[0]


def _without_group(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    return function(*args)


def run_ranks(num_ranks: int, function: Callable[..., Any], *args: Any, with_group: bool = True) -> list[Any]:
    """Run a module-level function on `num_ranks` gloo ranks of one thread each, on loopback; values by rank."""
    context = mp.get_context("spawn")
    values: list[Any] = [None] * num_ranks
    processes: list[Any] = []
    waiting: dict[Connection, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(num_ranks):
            reader, writer = context.Pipe(duplex=False)
            arguments = (rank, num_ranks, folder, writer, with_group, function, args)
            processes.append(context.Process(target=_rank_main, args=arguments))
            processes[-1].start()
            # The rank has the only end that writes now: when it ends, reading does, too.
            writer.close()
            waiting[reader] = rank
        # Asleep until a rank has something to say: one that looked again and again would take their processors for it.
        while waiting:
            ready: list[Any] = wait(list(waiting))
            for reader in ready:
                rank = waiting.pop(reader)
                try:
                    values[rank] = reader.recv()
                except EOFError:
                    processes[rank].join()
                    for process in processes:
                        process.terminate()
                    code = processes[rank].exitcode
                    raise SystemExit(f"a rank of {function.__name__} ended with code {code}") from None
        for process in processes:
            process.join()
    return values


def _rank_main(
    rank: int,
    num_ranks: int,
    folder: str,
    result: Connection,
    with_group: bool,
    function: Callable[..., Any],
    args: Any,
) -> None:
    torch.set_num_threads(1)
    if with_group:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        store = dist.FileStore(f"{folder}/store", num_ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
    result.send(function(*args))
    if with_group:
        dist.barrier()
        dist.destroy_process_group()


def _of_processor(key: str) -> str | None:
    """What the system says of the first processor (Linux)."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), None)


def product_dtypes() -> dict[str, torch.dtype]:
    """The dtypes in which matrix products are worth timing: bfloat16 only where the processor has instructions for them."""
    dtypes = {"float32": torch.float32}
    features = (_of_processor("flags") or _of_processor("Features") or "").split()
    if {"avx512_bf16", "amx_bf16", "bf16"} & set(features):
        dtypes["bfloat16"] = torch.bfloat16
    return dtypes


def machine() -> dict[str, str]:
    """What was measured on, by what."""
    model = _of_processor("model name") or platform.processor() or platform.machine()
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {
        "processor": model,
        "cores": str(os.cpu_count()),
        "products in": " and ".join(product_dtypes()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
    }


def save(tables: Sequence[Table], path: Path, about: dict[str, str] | None = None) -> None:
    """Write the tables and the machine, or what is known `about` it, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": about or machine(), "tables": [asdict(table) for table in tables]}
    path.write_text(json.dumps(content, indent=2) + "\n")
