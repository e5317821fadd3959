"""The small hybrid on sequences of a million tokens of real text, in segments of time over two ranks; its loss by position."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from longspan import stream
from longspan.data.batches import read_sequences
from longspan.data.prepared import open_prepared
from longspan.launch import num_cores
from longspan.train.trained import open_trained

WINDOW = 1024
"""Of the softmax layer: attention to all of a million tokens would take hours a step on a CPU."""
SHAPE = f"layers LLLN (simple_gla, softmax with a window of {WINDOW:,}), width 128, sources of Python's standard library, BPE"
# Of the text, so much that a million tokens are held out.
_HELD_OUT = 0.36


def train(num_tokens: int, segment: int, steps: int, max_bytes: int, folder: Path) -> list[dict[str, Any]]:
    """`longspan train` on sequences of `num_tokens`; its metrics."""
    values = {
        "parallel.sp": 2,
        "model.window": WINDOW,
        "data.documents": "concatenate",
        "data.validation_fraction": _HELD_OUT,
        "data.max_bytes": max_bytes,
        "data.folder": folder / "data",
        "train.seq_len": num_tokens,
        "train.batch_tokens": num_tokens,
        "train.segment_tokens": segment,
        "train.steps": steps,
        "train.check_tokens": min(num_tokens, 8192),
        "optim.lr": 1e-2,
        "optim.warmup_steps": 1,
        "validation.every": 0,
        "validation.sequences": 1,
        "checkpoint.every": 0,
        "sample.tokens": 0,
        "run.measure_alone": False,
        "run.dir": folder / "run",
    }
    options = [part for key, value in values.items() for part in (f"--{key}", str(value))]
    done = subprocess.run([sys.executable, "-m", "longspan", "train", *options], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"longspan train ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def by_position(folder: Path, num_tokens: int, segment: int) -> list[dict[str, float]]:
    """The mean loss of held-out tokens, by powers of √2 of the tokens before them."""
    torch.set_num_threads(num_cores())
    trained, data = open_trained(folder / "run"), open_prepared(folder / "data", False)
    length = min(num_tokens, data.validation.num_tokens - 1)
    batch = read_sequences([(data.validation, 0)], length, "concatenate").packed()
    found = stream(trained.model, segment).scores(batch.inputs, batch.labels)
    nats = torch.cat([scores.nats[0] for scores in found]).double()
    bounds = sorted({0, 32, *(round(2 ** (power / 2)) for power in range(10, 1 + int(2 * math.log2(length)))), length})
    return [{"first": first, "stop": stop, "nats": float(nats[first:stop].mean())} for first, stop in pairwise(bounds)]


def measure(quick: bool) -> dict[str, Any]:
    """Train, and score a held-out sequence as long."""
    num_tokens, segment, steps, max_bytes = (4096, 1024, 2, 100_000) if quick else (2**20, 2**14, 8, 12_000_000)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        metrics = train(num_tokens, segment, steps, max_bytes, folder)
        made = [record for record in metrics if "loss" in record]
        if len(made) != steps or not all(math.isfinite(record["loss"]) for record in made):
            raise SystemExit("a step was not finite: no figure is reported")
        return {
            "tokens": num_tokens,
            "segment_tokens": segment,
            "shape": SHAPE,
            "losses": [record["loss"] for record in made],
            "seconds": [record["seconds"] for record in made],
            "peak_bytes": max(record["peak_memory_bytes"] for record in made),
            "by_position": by_position(folder, num_tokens, segment),
        }
