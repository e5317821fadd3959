"""`overhead`: a step of the trainer beside bare forward, backward and optimizer step on the same batch, in turn in one process."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from longspan.launch import Place, StopRequest
from longspan.train import trainer as trainers
from longspan.train.config import from_mapping
from longspan.train.loss import loss_sum
from longspan.train.optimizer import build_optimizer
from longspan.train.ranks import Ranks
from longspan.train.run import train_on

_NUM_STEPS = 16
_NUM_WARM = 3


def measure(folder: Path) -> list[tuple[float, float]]:
    """Seconds of each step of the trainer, and of a bare step right after it, on one process of one thread."""
    torch.set_num_threads(1)
    config = from_mapping(
        {
            "data": {"max_bytes": 2_000_000},
            "parallel": {"sp": 1, "threads": 1},
            "train": {"steps": _NUM_STEPS},
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


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        pairs = measure(Path(folder))
    ratios = sorted(ours / theirs for ours, theirs in pairs)
    ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    print(
        f"a step of the trainer {ours:.3f} s, bare {theirs:.3f} s; ratio {statistics.median(ratios):.3f} "
        f"({ratios[0]:.3f} to {ratios[-1]:.3f}) over {len(pairs)} pairs"
    )


if __name__ == "__main__":
    main()
