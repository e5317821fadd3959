"""What the host does around the kernels' launches, measured without a GPU: everything runs but the kernels themselves."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.gpu_sides import OPERATORS, Case, fla_side, make_inputs, ours, step
from benchmarks.harness import Table, timed_pairs


def kernel_host(quick: bool) -> Table:
    """Triton must be installed; it is put in its interpreter's mode, where a launch is a Python call that can be left out."""
    os.environ["TRITON_INTERPRET"] = "1"
    from longspan.ops.triton.launch import interpreted

    if not interpreted():
        raise SystemExit("kernel_host: Triton was imported before; run the table alone")
    table = Table(
        "kernel_host",
        "Time of the host for forward + backward by kernels, launches left out, against flash-linear-attention, one thread",
        "no more than flash-linear-attention, whose calls of its autotuner are left out too",
        ["operator", "launches", "µs", "launches, fla", "µs, fla", "times as fast"],
    )
    torch.set_num_threads(1)
    for operator in OPERATORS:
        case = Case(operator, 256, 64, heads=2)
        inputs, peer = make_inputs(case, torch.device("cpu")), fla_side(case)
        with without_launches() as launches:
            counts = []
            sides = [partial(step, side, inputs) for side in (peer or ours, ours)]
            for side in sides:
                for _ in range(3):
                    launches.clear()
                    side()
                counts.append(len(launches))
            result = timed_pairs(sides[0], sides[1], 20 if quick else 1000)
        theirs = (counts[0], f"{result.first * 1e6:.0f}", result.ratio) if peer else ("", "not installed", "")
        table.add(operator, counts[1], f"{result.second * 1e6:.0f}", *theirs)
    return table


@contextmanager
def without_launches() -> Iterator[list[None]]:
    """Kernels do nothing but be counted, in the list that is given; autotuners take their first choice."""
    from triton.runtime import autotuner, interpreter

    launches: list[None] = []

    def count(*args: Any, **kwargs: Any) -> None:
        launches.append(None)

    def first_choice(self: Any, *args: Any, **kwargs: Any) -> None:
        self.best_config = self.configs[0]
        count()

    with (
        patch.object(interpreter.InterpretedFunction, "run", count),
        patch.object(autotuner.Autotuner, "run", first_choice),
        patch.object(autotuner.Heuristics, "run", count),
    ):
        yield launches


TABLES = {"kernel_host": kernel_host}
