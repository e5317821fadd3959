"""`overhead`: a step of the trainer beside bare forward, backward and optimizer step on the same batch, in turn in one process."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Table, in_subprocess, paired
from longspan.launch import Place, StopRequest
from longspan.train import trainer as trainers
from longspan.train.config import from_mapping
from longspan.train.loss import loss_sum
from longspan.train.optimizer import build_optimizer
from longspan.train.ranks import Ranks
from longspan.train.run import train_on

_NUM_WARM = 3


def measure(folder: Path, num_steps: int) -> list[tuple[float, float]]:
    """Seconds of each step of the trainer, and of a bare step right after it, on one process of one thread."""
    torch.set_num_threads(1)
    config = from_mapping(
        {
            "data": {"max_bytes": 2_000_000},
            "parallel": {"sp": 1, "threads": 1},
            "train": {"steps": num_steps},
            "validation": {"every": 0, "sequences": 1},
            "checkpoint": {"every": 0},
            "sample": {"tokens": 0},
            "run": {"dir": str(folder / "run"), "print_every": 1000},
        }
    )
    pairs: list[tuple[float, float]] = []
    bare: list[Any] = []
    step_of_trainer = trainers.Trainer._train_step

    def step(self: trainers.Trainer, *arguments: Any) -> bool:
        if not bare:
            model = self._build_model()
            bare.extend([model, build_optimizer(model, config.optim)])
        model, optimizer = bare
        packed, layout = self._make_batch(self.step).micro_batches[0]
        begun = time.perf_counter()
        stopping = step_of_trainer(self, *arguments)
        between = time.perf_counter()
        (loss_sum(model, packed, layout) / packed.num_valid_tokens).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        pairs.append((between - begun, time.perf_counter() - between))
        return stopping

    setattr(trainers.Trainer, "_train_step", step)  # noqa: B010
    try:
        train_on(Ranks(Place(), torch.device("cpu")), config, StopRequest())
    finally:
        setattr(trainers.Trainer, "_train_step", step_of_trainer)  # noqa: B010
    return pairs[_NUM_WARM:]


def overhead(quick: bool) -> Table:
    """See the module."""
    table = Table(
        "overhead",
        "A step of the main job's trainer, and bare forward, backward and optimizer step on the same batch: one process and thread",
        "below 1.05",
        ["s, trainer", "s, bare", "trainer over bare", "pairs"],
    )
    pairs = in_subprocess(_measured, 5 if quick else 19)
    found = paired([ours for ours, _ in pairs], [bare for _, bare in pairs])
    table.add(f"{found.first:.3f}", f"{found.second:.3f}", found.ratio.rounded(3), len(pairs))
    return table


def _measured(num_steps: int) -> list[tuple[float, float]]:
    with tempfile.TemporaryDirectory() as folder:
        return measure(Path(folder), num_steps)


TABLES: dict[str, Callable[[bool], Table]] = {"overhead": overhead}
