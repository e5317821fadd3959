"""What one process takes for a step: what a split of the sequences bought, measured at the end of a run.

In a process of its own, which makes a few steps and ends: the run's own process holds memory that has become scattered over many
steps, in which one process's steps took a third more than in a new one.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from longspan.data.packing import Sequences
from longspan.launch import Place, how_it_ended
from longspan.layout import SequenceLayout
from longspan.train import config as configs
from longspan.train.loss import forward_backward
from longspan.train.memory import StepMemory
from longspan.train.model import build_model, compute_dtype, make_parallel
from longspan.train.optimizer import build_optimizer
from longspan.train.ranks import Ranks
from longspan.train.segments import Segmentation
from longspan.train.trainer import Trainer

_NUM_STEPS = 2


@dataclass(frozen=True)
class Alone:
    """The most memory of a process, and its tokens a second, where it computes whole sequences."""

    memory_bytes: int
    tokens_per_second: float


def measure_alone(trainer: Trainer) -> Alone | None:
    """Let one more process make a few steps on sequences like those that the ranks of one data-parallel group share.

    It has the threads, or the GPU, of one rank, and the model's initial weights, and computes as the run does: in the same dtype,
    with the same recomputation and segments of time, compiled or not. Its tokens are random, its documents those of the first
    batch. To be called on rank 0 alone. None where `run.measure_alone` is False, where the ranks share no sequence, where one
    process is not asked for as many tokens (`train.check_tokens`), or where the process fails, of which the run says why.
    """
    config, ranks = trainer.config, trainer.ranks
    if not config.run.measure_alone:
        return None
    rows = config.batch_sequences // ranks.dp
    at_once = min(config.train.micro_batch_sequences or rows, rows)
    if ranks.sp == 1 or at_once * config.train.seq_len > config.train.check_tokens:
        return None
    told = {
        "config": configs.to_mapping(config),
        "vocab_size": trainer.data.vocab_size,
        "num_sequences": at_once,
        "document_starts": trainer.batches.batch(0, 0, at_once).document_starts,
        "threads": torch.get_num_threads(),
        "device": str(ranks.device),
    }
    seconds = config.parallel.timeout_seconds / 2
    try:
        done = subprocess.run(
            [sys.executable, "-m", "longspan.train.alone"],
            input=json.dumps(told),
            capture_output=True,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        failure = f"took longer than {seconds:g} s, half of parallel.timeout_seconds"
    except OSError as error:
        failure = f"could not be started: {error}"
    else:
        if done.returncode == 0:
            # The last line: what a library says on the way is no part of it.
            return Alone(**json.loads(done.stdout.splitlines()[-1]))
        failure = ": ".join([how_it_ended(done.returncode), *done.stderr.splitlines()[-1:]])
    trainer.report.heading("alone", f"one process that was to take whole sequences {failure}")
    return None


def take_steps(told: dict[str, Any]) -> Alone:
    """What the process of its own does; `told` is what `measure_alone` tells it."""
    torch.set_num_threads(told["threads"])
    device = torch.device(told["device"])
    config = configs.from_mapping(told["config"])
    model = make_parallel(
        build_model(config, told["vocab_size"], device), config, Ranks(Place(), device), compute_dtype(config)
    )
    optimizer = build_optimizer(model, config.optim)
    tokens = torch.randint(told["vocab_size"], (told["num_sequences"], config.train.seq_len + 1))
    starts = told["document_starts"]
    packed = Sequences(tokens, None if starts is None else tuple(map(tuple, starts))).packed().to(device)
    layout = SequenceLayout.local(packed.seq_len, packed.documents)
    memory = StepMemory(device, config.run.release_memory_every)
    memory.begin()
    begun = time.perf_counter()
    for step in range(1 + _NUM_STEPS):
        if step == 1:
            # The first one finds memory and threads cold.
            begun = time.perf_counter()
        forward_backward(
            model,
            packed,
            layout,
            packed.num_valid_tokens,
            Segmentation.of(config.train),
            between=lambda _: memory.pass_ended(),
        )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        memory.end()
    seconds = (time.perf_counter() - begun) / _NUM_STEPS
    _, peak = memory.take()
    return Alone(peak, packed.inputs.numel() / seconds)


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


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asdict(take_steps(json.load(sys.stdin)))))
