"""What ``longspan doctor`` looks at: one function a subject, each with a verdict."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from longspan.launch import Place, num_cores
from longspan.train.ranks import Ranks

Verdict = Literal["ok", "warning", "error"]

_LEAST_FILES = 4096
_LEAST_SHARED_MEMORY = 2**30
_LEAST_DISK = 10 * 2**30
_MOST_CLOCK_OFFSET = 1.0
_PACKAGES = ("longspan", "torch", "numpy", "safetensors", "triton", "transformers", "flash-linear-attention")
_PINGS = 50
_BANDWIDTH_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Finding:
    """A line: verdict, what was looked at, what was found, and what to do about it (empty where nothing is to be done).

    amount: of what is measured, of which the rank that has least is the one to know of.
    """

    verdict: Verdict
    subject: str
    found: str
    remedy: str = ""
    amount: float | None = None

    def to_json(self) -> dict[str, Any]:
        """What travels between ranks."""
        return asdict(self)

    def line(self, ranks: str = "") -> str:
        """As it is printed; ranks: whose finding it is, where they differ."""
        remedy = f". {self.remedy}" if self.remedy else ""
        return f"{self.verdict:<8} {self.subject:<14} {ranks}{self.found}{remedy}"


def examine_machine(device: torch.device, place: Place) -> Iterator[Finding]:
    """What each rank finds by itself."""
    yield versions()
    yield cores(num_cores(), place.local_world_size, torch.get_num_threads())
    yield compute(device)
    yield backends(device)
    yield kernels(device)
    yield open_files(_file_limit())
    yield room(
        "shared memory",
        Path("/dev/shm"),
        _LEAST_SHARED_MEMORY,
        "NCCL and data loaders share memory there: mount it "
        "larger (docker run --shm-size=8g; in Kubernetes an emptyDir of medium Memory at /dev/shm)",
    )
    yield room(
        "disk",
        Path.cwd(),
        _LEAST_DISK,
        "A run's checkpoints go to the folder that it is started in, unless run.dir "
        "says otherwise: make room, or give a run.dir on another disk",
    )


def versions() -> Finding:
    """Of Python and of the packages that matter."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return Finding("ok", "versions", ", ".join(f"{name} {number}" for name, number in found.items()))


def cores(num_cores: int, local_ranks: int, threads: int) -> Finding:
    """Whether each local rank has a core of its own."""
    found = f"{num_cores} for {local_ranks} local rank{'s' * (local_ranks > 1)}"
    if local_ranks > num_cores:
        return Finding(
            "warning",
            "cores",
            found,
            "Ranks share cores and wait for each other: start fewer, or take a larger machine",
        )
    return Finding("ok", "cores", found)


def compute(device: torch.device) -> Finding:
    """What the rank computes on, and whether bfloat16 pays there."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found, amount = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB", float(properties.total_memory)
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            return Finding("warning", "device", f"{found}, no bfloat16", "Use train.dtype 'float32'", amount)
        return Finding("ok", "device", f"{found}, bfloat16", amount=amount)
    from longspan.train.rate import measure_flops

    float32, bfloat16 = (measure_flops(dtype) for dtype in (torch.float32, torch.bfloat16))
    found = f"CPU, one rank: {float32 / 1e9:,.0f} GFLOP/s in float32, {bfloat16 / 1e9:,.0f} in bfloat16"
    slower = " (train.dtype 'bfloat16' would be slower here)" if bfloat16 < float32 else ""
    return Finding("ok", "device", found + slower, amount=float32)


def backends(device: torch.device) -> Finding:
    """What torch.distributed can use for the device."""
    names = [name for name in ("gloo", "nccl", "mpi") if getattr(dist, f"is_{name}_available")()]
    needed = "nccl" if device.type == "cuda" else "gloo"
    if needed not in names:
        return Finding("error", "backends", ", ".join(names) or "none", f"Install a build of torch that has {needed}")
    return Finding("ok", "backends", ", ".join(names))


def kernels(device: torch.device) -> Finding:
    """Whether the operators' kernels are there."""
    has = {name: importlib.util.find_spec(name) is not None for name in ("triton", "fla")}
    found = ", ".join(f"{name} {'installed' if there else 'not installed'}" for name, there in has.items())
    if device.type == "cuda" and not has["triton"]:
        return Finding(
            "warning",
            "kernels",
            found,
            "Without Triton, linear attention takes the slower PyTorch form: pip install triton",
        )
    return Finding("ok", "kernels", found + ("" if device.type == "cuda" else "; the CPU needs none"))


def _file_limit() -> int:
    import resource

    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def open_files(limit: int) -> Finding:
    """Whether the process may open as many files and sockets as a large group wants."""
    if 0 <= limit < _LEAST_FILES:
        return Finding(
            "warning", "open files", f"at most {limit}", f"Raise it before the start: ulimit -n {_LEAST_FILES * 16}"
        )
    return Finding("ok", "open files", "no limit" if limit < 0 else f"at most {limit:,}")


def room(subject: str, folder: Path, least: int, remedy: str) -> Finding:
    """Whether a file system has at least so many bytes free."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return Finding("warning", subject, f"{folder} cannot be looked at: {error}", remedy)
    found = f"{free / 2**30:.1f} GiB free in {folder}"
    if not os.access(folder, os.W_OK):
        return Finding("error", subject, f"{folder} cannot be written to", remedy)
    if free < least:
        return Finding("warning", subject, found, remedy, float(free))
    return Finding("ok", subject, found, amount=float(free))


def examine_group(ranks: Ranks) -> Iterator[Finding]:
    """What the ranks find together: the same findings on every rank."""
    if ranks.world_size == 1:
        yield Finding("ok", "group", "one rank: nothing to exchange")
        return
    own = {"host": platform.node(), "versions": versions().found, "device": ranks.device.type}
    yield alike(ranks.gather_json(own))
    latency, bandwidth, offset = _measure_links(ranks)
    yield Finding(
        "ok",
        "links",
        f"{ranks.world_size} ranks, by {dist.get_backend()}: a message to the next rank and back takes {latency * 1e6:,.0f} µs "
        f"on the slowest pair, {_BANDWIDTH_BYTES // 2**20} MiB go at {bandwidth / 1e6:,.0f} MB/s, all pairs at once",
    )
    yield clocks(offset)


def alike(everyone: list[dict[str, str]]) -> Finding:
    """Whether all ranks run the same versions on the same kind of device."""
    hosts = len({own["host"] for own in everyone})
    for key in ("versions", "device"):
        values = [own[key] for own in everyone]
        if len({*values}) > 1:
            other = next(rank for rank, value in enumerate(values) if value != values[0])
            return Finding(
                "error",
                "group",
                f"{key} differ: rank 0 has {values[0]}; rank {other} on {everyone[other]['host']} has {values[other]}",
                "Install the same on every host, or start with the same options",
            )
    return Finding(
        "ok", "group", f"{len(everyone)} ranks on {hosts} host{'s' * (hosts > 1)}, the same versions everywhere"
    )


def clocks(offset: float) -> Finding:
    """offset: the largest difference of a rank's clock from rank 0's, in seconds."""
    found = f"differ by at most {offset * 1e3:,.1f} ms between ranks"
    if offset > _MOST_CLOCK_OFFSET:
        return Finding(
            "warning", "clocks", found, "Logs and time-outs of hosts will not match: run NTP or chrony on every host"
        )
    return Finding("ok", "clocks", found)


def _measure_links(ranks: Ranks) -> tuple[float, float, float]:
    """The worst of all ranks: seconds of a message to the next rank and back, bytes a second to it, how far clocks are apart."""
    following, before = (ranks.rank + 1) % ranks.world_size, (ranks.rank - 1) % ranks.world_size
    small = torch.zeros(8, dtype=torch.uint8, device=ranks.device)
    large = torch.zeros(_BANDWIDTH_BYTES, dtype=torch.uint8, device=ranks.device)

    def around(content: torch.Tensor) -> float:
        """Seconds until what went to the next rank has come from the one before."""
        arrived = torch.empty_like(content)
        begun = time.perf_counter()
        works = dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, content, following), dist.P2POp(dist.irecv, arrived, before)]
        )
        for work in works:
            work.wait()
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    around(small)
    latency = 2 * min(around(small) for _ in range(_PINGS))
    bandwidth = _BANDWIDTH_BYTES / min(around(large) for _ in range(5))
    # All leave a gathering within a message's time of each other; the one that took least disturbs least.
    offsets = []
    for _ in range(_PINGS):
        ranks.gather_numbers([0.0])
        times = ranks.gather_numbers([time.time()])[:, 0]
        offsets.append(float(times.max() - times.min()))
    worst = ranks.gather_numbers([latency, -bandwidth, min(offsets)]).max(0).values
    return float(worst[0]), -float(worst[1]), float(worst[2])


def lines(everyone: list[list[dict[str, Any]]]) -> tuple[str, bool]:
    """The text of all ranks' findings, one line where they agree; whether there is an error."""
    text, failed, counts = "", False, {"warning": 0, "error": 0}
    for findings in zip(*everyone, strict=True):
        groups: dict[str, list[int]] = {}
        for rank, finding in enumerate(findings):
            groups.setdefault(finding["verdict"] + finding["found"], []).append(rank)
        # What is measured differs from rank to rank: the one that has least is enough.
        amounts = [finding["amount"] for finding in findings]
        least = None
        if len(groups) > 1 and None not in amounts and len({finding["verdict"] for finding in findings}) == 1:
            least = amounts.index(min(amounts))
            groups = {"": [least]}
        for members in groups.values():
            finding = Finding(**findings[members[0]])
            who = "" if len(groups) == 1 else f"rank{'s' * (len(members) > 1)} {', '.join(map(str, members))}: "
            text += finding.line(who if least is None else f"rank {least}, which has least: ") + "\n"
            failed |= finding.verdict == "error"
            if finding.verdict != "ok":
                counts[finding.verdict] += 1
    return text + f"\n{counts['error']} errors, {counts['warning']} warnings\n", failed
