"""What a checkpoint costs a training: the time it holds up the steps, written while they go on or before they do."""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.harness import Table, paired, run_ranks, seconds, seconds_of_slowest
from longspan.launch import Place
from longspan.layout import SequenceLayout
from longspan.models import LinearLlama3, LinearLlama3Config
from longspan.parallel import parallelize, sum_gradients
from longspan.train.checkpoint import folder_name, verify_checkpoint
from longspan.train.loading import open_checkpoint
from longspan.train.ranks import Ranks
from longspan.train.saving import CheckpointSaver

VOCABULARY = 2048
SIDES = ("none", "before they go on", "while they go on")
"""How a checkpoint is written within a stretch of steps."""


class _Training:
    """Steps of AdamW on random tokens, over all ranks."""

    def __init__(self, width: int, seq_len: int) -> None:
        torch.manual_seed(0)
        config = LinearLlama3Config(
            VOCABULARY, dim=width, num_layers=4, pattern="LLLN", num_heads=4, num_kv_heads=2, hidden_dim=3 * width
        )
        self.model = parallelize(LinearLlama3(config), dist.group.WORLD, exchange="all_gather")
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.layout = SequenceLayout(seq_len)
        self.tokens = self.layout.shard(torch.randint(VOCABULARY, (1, seq_len)))
        self.seq_len = seq_len

    def step(self) -> None:
        """Forward, backward, sum over ranks, update."""
        logits = self.model(self.tokens, layout=self.layout)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), self.tokens.flatten(), reduction="sum")
        (loss / self.seq_len).backward()
        sum_gradients(self.model)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds of weights and optimizer."""
        named = dict(self.model.named_parameters())
        states = {
            f"optimizer/{name}/{key}": value
            for name, parameter in named.items()
            for key, value in self.optimizer.state[parameter].items()
        }
        return {f"model/{name}": parameter for name, parameter in named.items()} | states


def _measure(folder: str, width: int, seq_len: int, num_steps: int, rounds: int) -> dict[str, Any]:
    """Seconds of the slowest rank, by side and round: of a stretch of steps with the checkpoint, and of rank 0 within its calls."""
    training = _Training(width, seq_len)
    for _ in range(2):
        training.step()
    ranks = Ranks(Place(dist.get_rank(), dist.get_world_size()), torch.device("cpu"))
    savers = {side: CheckpointSaver(Path(folder), ranks, 1, asynchronous=side == SIDES[2]) for side in SIDES[1:]}
    number = 0
    stretches: dict[str, list[float]] = {side: [] for side in SIDES}
    calls: dict[str, list[float]] = {side: [] for side in SIDES[1:]}
    spans: list[int] = []
    for index in range(rounds + 1):
        # Each side stands in each place of a round, in turn; the first round is not counted.
        order = [SIDES[(index + place) % len(SIDES)] for place in range(len(SIDES))]
        for side in order:
            os.sync()
            number += 1
            call: list[float] = []
            steps: list[int] = []
            elapsed = seconds_of_slowest(_stretch(training, savers.get(side), number, num_steps, call, steps))
            if side != SIDES[0]:
                _require_whole(Path(folder), number, training)
            if index:
                stretches[side].append(elapsed)
                if call:
                    calls[side].append(sum(call))
                spans += steps if side == SIDES[2] else []
    path = Path(folder) / folder_name(number if order[-1] != SIDES[0] else number - 1)
    sizes = [file.stat().st_size for file in verify_checkpoint(path)]
    return {"stretches": stretches, "calls": calls, "spans": spans, "bytes": sum(sizes)}


def _stretch(
    training: _Training, saver: CheckpointSaver | None, number: int, num_steps: int, call: list[float], steps: list[int]
) -> Callable[[], None]:
    def run() -> None:
        if saver is not None:
            call.append(seconds(lambda: saver.start(number, training.tensors(), {})))
        for step in range(num_steps):
            training.step()
            if saver is not None and saver.is_pending:
                call.append(seconds(saver.advance))
                if not saver.is_pending:
                    steps.append(step + 1)
        if saver is not None:
            call.append(seconds(saver.finish))

    return run


def _require_whole(folder: Path, number: int, training: _Training) -> None:
    """Refuse to report a checkpoint that cannot be read, or lacks a tensor."""
    saved = open_checkpoint(folder / folder_name(number))
    if saved.index.keys() != training.tensors().keys():
        raise SystemExit(f"the checkpoint {number} does not hold what was saved")


def checkpoint(quick: bool) -> Table:
    width, seq_len, num_steps, rounds = (128, 256, 4, 1) if quick else (384, 256, 10, 4)
    folder = tempfile.mkdtemp(prefix="longspan-checkpoint-")
    try:
        found = run_ranks(2, _measure, folder, width, seq_len, num_steps, rounds)[0]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    plain = found["stretches"][SIDES[0]]
    table = Table(
        "checkpoint",
        f"A checkpoint of {found['bytes'] / 2**20:,.0f} MiB (weights and AdamW) within {num_steps} steps of two ranks of one "
        f"thread, {statistics.median(plain) / num_steps:.2f} s each",
        "an asynchronous checkpoint holds training up for less than a synchronous one",
        ["files are written", "held up by calls, s", "times less", "added to the stretch, s", "steps until complete"],
    )
    added = {
        side: [with_ - without for with_, without in zip(found["stretches"][side], plain, strict=True)]
        for side in SIDES[1:]
    }
    for side in SIDES[1:]:
        table.add(
            f"{side}",
            _spread(found["calls"][side]),
            paired(found["calls"][SIDES[1]], found["calls"][side]).ratio.rounded(1) if side == SIDES[2] else "1",
            _spread(added[side]),
            _spread(found["spans"], 0) if side == SIDES[2] else "0",
        )
    return table


def _spread(values: list[float], digits: int = 2) -> str:
    if not values:
        return "not within them"
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


TABLES = {"checkpoint": checkpoint}
