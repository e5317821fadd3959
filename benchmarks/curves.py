"""The loss, step by step, of the same training run on several meshes: what one process has, they all have."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

MESHES = {
    "1 process": (1, 1, 1),
    "sequence 2": (1, 1, 2),
    "sequence 4": (1, 1, 4),
    "data 2 x sequence 2": (2, 1, 2),
    "sharded 2 x sequence 2": (1, 2, 2),
}
"""dp_replicate, dp_shard and sp of each side; the first is what the others are compared with."""

TOLERANCE = 1e-5
"""Largest relative difference of a loss."""

MODEL = ("--model.dim", "64", "--model.hidden_dim", "176", "--model.num_heads", "2", "--data.vocab_size", "512")
SHAPE = "4 layers (3 simple_gla, 1 softmax), width 64, vocabulary 512, float32, AdamW, clipped norm"


def losses(mesh: tuple[int, int, int], seq_len: int, steps: int, data: Path, run: Path) -> list[float]:
    """The losses of `longspan train` on a mesh."""
    replicate, shard, sp = map(str, mesh)
    command = [
        *(sys.executable, "-m", "longspan", "train", *MODEL),
        *("--parallel.dp_replicate", replicate, "--parallel.dp_shard", shard, "--parallel.sp", sp),
        *("--parallel.device", "cpu", "--parallel.exchange", "all_gather"),
        *("--train.steps", str(steps), "--train.seq_len", str(seq_len), "--train.batch_tokens", str(4 * seq_len)),
        *("--optim.lr", "1e-3", "--validation.every", "0", "--checkpoint.every", "0", "--sample.tokens", "0"),
        *("--data.folder", str(data), "--data.max_bytes", "4000000", "--run.dir", str(run)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [record["loss"] for record in records if "loss" in record]


def measure(seq_len: int, steps: int) -> dict[str, Any]:
    """Every mesh's losses, and the largest relative difference from the first one's.

    Refuses to report where a run fails, or a loss differs by more than `TOLERANCE`.
    """
    found: dict[str, Any] = {}
    expected: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (side, mesh) in enumerate(MESHES.items()):
            run = Path(folder) / f"run-{number}"
            made = losses(mesh, seq_len, steps, Path(folder) / "data", run)
            expected = expected or made
            differences = [abs(got - want) / want for got, want in zip(made, expected, strict=True)]
            # A NaN is no number below the tolerance.
            if len(made) != steps or not all(difference <= TOLERANCE for difference in differences):
                raise SystemExit(
                    f"{side} differs from one process by {max(differences):.1e}; at most {TOLERANCE:.0e} is right: no figure is "
                    "reported"
                )
            found[side] = {"mesh": mesh, "losses": made, "relative_differences": differences}
    return found
