"""The table and the JSON file of ``longspan bench exchange``."""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

import longspan
from longspan.commands.bench_options import BenchExchange
from longspan.commands.table import columns
from longspan.launch import num_cores
from longspan.plan import Cost


@dataclass(frozen=True)
class Measured:
    """One topology: medians over the repeats, of the slowest rank; bytes and messages of the rank that sends most each way, summed.

    seconds, low_seconds, high_seconds: median, least and most of forward and backward together.
    """

    topology: str
    forward_seconds: float
    backward_seconds: float
    seconds: float
    low_seconds: float
    high_seconds: float
    bytes_sent: int
    num_messages: int
    modelled: Cost


@dataclass(frozen=True)
class BenchFigures:
    """What was measured on how many ranks, with the measured cluster in words and the topology that ``"auto"`` takes."""

    options: BenchExchange
    num_ranks: int
    cluster: str
    choice: str
    rows: list[Measured]


def print_figures(figures: BenchFigures) -> None:
    """Write the table to standard output, fastest first."""
    options = figures.options
    where = f"{figures.num_ranks} ranks on {options.device}, median of {options.repeats}"
    sys.stdout.write(f"{options.describe()}, {where}\n{figures.cluster}\n\n")
    heading = ["topology", "forward ms", "modelled", "backward ms", "modelled", "both ms", "modelled", "range"]
    heading += ["bytes", "messages"]
    rows = []
    for row in sorted(figures.rows, key=lambda row: row.seconds):
        model = row.modelled
        pairs = [
            (row.forward_seconds, model.forward.seconds),
            (row.backward_seconds, model.backward.seconds),
            (row.seconds, model.seconds),
        ]
        times = [f"{seconds * 1e3:.2f}" for pair in pairs for seconds in pair]
        name = f"auto ({model.topology})" if row.topology == "auto" else row.topology
        times.append(f"{row.low_seconds * 1e3:.2f}-{row.high_seconds * 1e3:.2f}")
        rows.append([name, *times, f"{row.bytes_sent:,}", str(row.num_messages)])
    sys.stdout.write(columns(heading, rows))
    sys.stdout.write(f"\nauto takes {figures.choice}\n")
    sys.stdout.flush()


def write_json(figures: BenchFigures, path: str) -> None:
    """Write the figures, with what they were measured on, to a JSON file."""
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": platform.node(),
        "machine": platform.machine(),
        "cores": num_cores(),
        "torch": torch.__version__,
        "longspan": longspan.__version__,
        "command": sys.argv,
        **asdict(figures),
    }
    Path(path).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
