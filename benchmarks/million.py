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

from benchmarks.harness import say
from longspan import stream
from longspan.data.batches import read_sequences
from longspan.data.prepared import open_prepared
from longspan.launch import num_cores
from longspan.train.trained import open_trained

WINDOW = 1024
"""Of the softmax layer: attention to all of a million tokens would take hours a step on a CPU."""
SHAPE = f"layers LLLN (simple_gla, softmax with a window of {WINDOW:,}), width 128, sources of Python's standard library, BPE"
# Of the text, about three million tokens: both what is held out and what is trained on have more than one million.
_HELD_OUT = 0.5


def train(folder: Path, name: str, **values: Any) -> list[dict[str, Any]]:
    """`longspan train` over two ranks, whose lines are printed; the metrics of its steps, all of them finite."""
    values = {
        "parallel.sp": 2,
        "model.window": WINDOW,
        "data.documents": "concatenate",
        "data.validation_fraction": _HELD_OUT,
        "data.folder": folder / "data",
        "validation.every": 0,
        "checkpoint.every": 0,
        "sample.tokens": 0,
        "run.measure_alone": False,
        "run.dir": folder / name,
        **values,
    }
    options = [part for key, value in values.items() for part in (f"--{key}", str(value))]
    say("longspan train " + " ".join(options))
    done = subprocess.run([sys.executable, "-m", "longspan", "train", *options])
    if done.returncode:
        raise SystemExit(f"longspan train ended with {done.returncode}: see above")
    lines = (folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    made = [record for record in map(json.loads, lines) if "loss" in record]
    if len(made) != values["train.steps"] or not all(math.isfinite(record["loss"]) for record in made):
        raise SystemExit("a step was not finite: no figure is reported")
    return made


def by_position(folder: Path, name: str, num_tokens: int, segment: int) -> list[dict[str, float]]:
    """The mean loss of held-out tokens, by powers of √2 of the tokens before them."""
    torch.set_num_threads(num_cores())
    trained, data = open_trained(folder / name), open_prepared(folder / "data", False)
    length = min(num_tokens, data.validation.num_tokens - 1)
    batch = read_sequences([(data.validation, 0)], length, "concatenate").packed()
    nats = []
    for scores in stream(trained.model, segment).scores(batch.inputs, batch.labels):
        nats.append(scores.nats[0].double())
        if len(nats) % 16 == 0:
            say(f"{name}: scored {len(nats) * segment:,} of {length:,} held-out tokens")
    everyone = torch.cat(nats)
    bounds = sorted({0, 32, *(round(2 ** (power / 2)) for power in range(10, 1 + int(2 * math.log2(length)))), length})
    return [
        {"first": first, "stop": stop, "nats": float(everyone[first:stop].mean())} for first, stop in pairwise(bounds)
    ]


def measure(quick: bool) -> dict[str, Any]:
    """Train on short sequences, go on with long ones, and score a held-out sequence as long by both."""
    short, num_tokens, segment, steps_short, steps = (512, 4096, 1024, 4, 2) if quick else (8192, 2**20, 2**14, 100, 2)
    size = {"data.max_bytes": 100_000} if quick else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        before = train(
            folder,
            "short",
            **{**size, "train.seq_len": short, "train.batch_tokens": short, "train.steps": steps_short},
        )
        made = train(
            folder,
            "long",
            **{
                **size,
                "train.init": folder / "short",
                "train.seq_len": num_tokens,
                "train.batch_tokens": num_tokens,
                "train.segment_tokens": segment,
                "train.steps": steps,
                "train.check_tokens": min(num_tokens, 8192),
                "optim.lr": 1e-3,
                "optim.warmup_steps": 1,
                "validation.sequences": 1,
            },
        )
        return {
            "tokens": num_tokens,
            "segment_tokens": segment,
            "shape": SHAPE,
            "tokens_before": short,
            "losses_before": [record["loss"] for record in before],
            "losses": [record["loss"] for record in made],
            "seconds": [record["seconds"] for record in made],
            "peak_bytes": max(record["peak_memory_bytes"] for record in made),
            "by_position": {
                f"after {steps_short} steps on {short:,} tokens": by_position(folder, "short", num_tokens, segment),
                f"and {steps} on {num_tokens:,}": by_position(folder, "long", num_tokens, segment),
            },
        }
