"""What one process would have taken for a step: what a split of the sequences bought, measured at the end of a run."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.layout import SequenceLayout
from longspan.parallel.sharded import on_this_rank
from longspan.train.loss import loss_sum
from longspan.train.memory import current_memory_bytes, forget_peak, peak_memory_bytes, release_freed_memory
from longspan.train.optimizer import build_optimizer
from longspan.train.trainer import Trainer

_NUM_STEPS = 2


@dataclass(frozen=True)
class Alone:
    """The most memory of a process, and its tokens a second, where it computes whole sequences."""

    memory_bytes: int
    tokens_per_second: float


def measure_alone(trainer: Trainer, weights: dict[str, Tensor]) -> Alone | None:
    """Make a few steps as one process, on the sequences that the ranks of one data-parallel group share; called on rank 0 alone.

    It has the threads, or the GPU, of one rank, and computes in float32. None where the ranks share no sequence, or where one
    process is not asked for as many tokens (`train.check_tokens`). The run's own weights stay as they are.

    Args:
        weights: of the model, whole.
    """
    config, ranks = trainer.config, trainer.ranks
    rows = config.batch_sequences // ranks.dp
    at_once = min(config.train.micro_batch_sequences or rows, rows)
    if ranks.sp == 1 or at_once * config.train.seq_len > config.train.check_tokens or config.train.dtype != "float32":
        return None
    release_freed_memory()
    forget_peak(ranks.device)
    held = current_memory_bytes(ranks.device)
    model = trainer.model_for_one_process(weights)
    optimizer = build_optimizer(model, config.optim)
    packed = trainer.batches.batch(0, 0, at_once).packed().to(ranks.device)
    layout = SequenceLayout.local(packed.seq_len, packed.documents)
    begun = time.perf_counter()
    for step in range(1 + _NUM_STEPS):
        if step == 1:
            # The first one finds memory and threads cold.
            begun = time.perf_counter()
        loss = loss_sum(model, packed, layout) / max(1, packed.num_valid_tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ranks.device.type == "cuda":
            torch.cuda.synchronize(ranks.device)
    seconds = (time.perf_counter() - begun) / _NUM_STEPS
    # What the steps took, on top of what a process holds before its first step: with the run's model, which stands for its own.
    grown = peak_memory_bytes(ranks.device) - held
    weights_bytes = sum(on_this_rank(parameter).nbytes for parameter in trainer.model.parameters())
    return Alone(trainer.memory.base - weights_bytes + grown, packed.inputs.numel() / seconds)


def gain_lines(trainer: Trainer, alone: Alone) -> tuple[str, str]:
    """What the split bought in memory, and in tokens a second, a line each."""
    ranks, totals, sp = trainer.ranks, trainer.totals, trainer.ranks.sp
    # Ranks of other data-parallel groups compute other sequences.
    speed = totals.tokens_per_second / ranks.dp
    split, whole = (num_bytes / 2**30 for num_bytes in (totals.memory_bytes, alone.memory_bytes))
    return (
        f"{split:.2f} GiB at most on each of {sp} ranks that share a sequence; {whole:.2f} GiB on one process that takes it whole: "
        f"{split / whole:.2f} of it",
        f"{speed:,.0f} on {sp} ranks; {alone.tokens_per_second:,.0f} on one process with the threads of one of them: "
        f"{speed / alone.tokens_per_second:.2f} times as fast",
    )
