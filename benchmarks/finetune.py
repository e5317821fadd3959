"""Fine-tuning by Transformers' Trainer on real text: its losses and the peak memory of each process, alone and over two ranks."""

from __future__ import annotations

import os
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.harness import peak_bytes, require_close, run_ranks
from benchmarks.small_hybrid import small_hybrid

SIDES = {"Transformers, 1 process": 1, "longspan, 1 process": 1, "longspan, 2 ranks": 2}
"""How many processes share a sequence on each side."""

SHAPE = "4 layers (3 gated delta rule, 1 softmax), hidden 128, bytes, float32, AdamW, clipped norm"


def text_rows(num_rows: int, length: int) -> list[dict[str, torch.Tensor]]:
    """Sequences of bytes of the sources of Python's standard library."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = b"".join(source.read_bytes() for source in sources)[: num_rows * length]
    rows = torch.tensor(list(text)).view(num_rows, length)
    return [{"input_ids": row, "labels": row} for row in rows]


def run(side: str, length: int, steps: int) -> dict[str, Any]:
    """Losses and norms by step, and the peak memory of this process beyond what it had before the training."""
    from transformers import PrinterCallback, Trainer, TrainingArguments, default_data_collator, logging

    from longspan.integrations.transformers import SequenceParallelConfig, prepare_trainer

    logging.set_verbosity_error()
    num_ranks = SIDES[side]
    if num_ranks > 1:
        # What torchrun would say.
        rank = str(dist.get_rank())
        os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=str(num_ranks), LOCAL_WORLD_SIZE=str(num_ranks))
        os.environ.update(MASTER_ADDR="127.0.0.1")
    os.environ.update(OMP_NUM_THREADS="1")
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=1,
            learning_rate=2e-3,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            ddp_backend="gloo" if num_ranks > 1 else None,
            parallelism_config=SequenceParallelConfig(cp_size=num_ranks) if side.startswith("longspan") else None,
        )
        rows = text_rows(steps, length)
        trainer = Trainer(
            model=small_hybrid(128, feed_forward=384, key_heads=2, vocabulary=256),
            args=args,
            train_dataset=rows,
            data_collator=default_data_collator,
        )
        trainer.remove_callback(PrinterCallback)
        if side.startswith("longspan"):
            prepare_trainer(trainer)
        peak = peak_bytes(trainer.train)
    log = trainer.state.log_history
    losses, norms = ([row[name] for row in log if name in row] for name in ("loss", "grad_norm"))
    return {"losses": losses, "norms": norms, "peak_bytes": peak}


def measure(length: int, steps: int) -> dict[str, Any]:
    """Every side, and how far its losses are from those of Transformers in one process."""
    found: dict[str, Any] = {}
    for side, num_ranks in SIDES.items():
        by_rank = run_ranks(num_ranks, run, side, length, steps, with_group=num_ranks > 1)
        found[side] = {**by_rank[0], "peak_bytes": [one["peak_bytes"] for one in by_rank]}
    expected = torch.tensor(found["Transformers, 1 process"]["losses"], dtype=torch.float64)
    for side, one in found.items():
        got = torch.tensor(one["losses"], dtype=torch.float64)
        require_close(side, got, expected, 2e-2)
        one["largest_relative_difference"] = float(((got - expected).abs() / expected).max())
    return found
