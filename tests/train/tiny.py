"""A run that takes a second: what the tests of the trainer share."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from longspan.launch import Place, StopRequest
from longspan.train.checkpoint import newest_checkpoint
from longspan.train.config import Config, from_mapping
from longspan.train.config_checks import check
from longspan.train.ranks import Ranks
from longspan.train.run import train_on
from longspan.train.run_folder import RunFolder
from tests.train.checkpoints import load_checkpoint

TINY: dict[str, dict[str, Any]] = {
    "data": {"tokenizer": "bytes", "validation_fraction": 0.3},
    "model": {"dim": 16, "num_layers": 2, "pattern": "LN", "num_heads": 2, "num_kv_heads": 1, "hidden_dim": 24},
    "optim": {"lr": 1e-2, "warmup_steps": 2},
    "train": {"steps": 6, "seq_len": 61, "batch_tokens": 366},
    "validation": {"every": 3, "sequences": 3},
    "checkpoint": {"every": 3},
    "sample": {"tokens": 4},
}


def write_corpus(folder: Path) -> Path:
    """Twelve small files of text with something to learn in it."""
    folder.mkdir(parents=True)
    numbers = random.Random(0)
    for name in range(12):
        words = (numbers.choice(["alpha ", "beta ", "gamma\n"]) for _ in range(100))
        (folder / f"{name}.txt").write_text("".join(words))
    return folder


def tiny_config(corpus: Path, run: Path, **values: Any) -> Config:
    """`TINY` on `corpus` in the folder `run`, changed by ``section__key=value``."""
    mapping = {section: dict(entries) for section, entries in TINY.items()}
    mapping["data"]["source"] = str(corpus)
    # Each run would start one process more.
    mapping["run"] = {"dir": str(run), "measure_alone": False}
    for key, value in values.items():
        section, name = key.split("__")
        mapping.setdefault(section, {})[name] = value
    config = from_mapping(mapping)
    check(config)
    return config


def train_here(config: Config, resume: bool = False, stop_at_once: bool = False) -> int:
    """The main job on the ranks that this is called on; the exit code."""
    stop = StopRequest()
    stop.requested = stop_at_once
    ranks = Ranks(Place(dist.get_rank(), dist.get_world_size()), torch.device("cpu"))
    folder = RunFolder(Path(str(config.run.dir))) if resume else None
    # Drawing takes as long as the steps, and is the same in all runs: see tests/train/test_metrics.py and tests/test_cli.py.
    with mock.patch("longspan.train.finish.plot_losses", lambda *values: values[-1].write_bytes(b"not drawn")):
        return train_on(ranks, config, stop, folder)


def metrics(run: Path, *keys: str) -> list[dict[str, Any]]:
    """The run's metrics; with keys, those of them that a record has."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: r[key] for key in keys if key in r} for r in records] if keys else records


# What a run computes, and not how long it took.
COMPUTED = ("step", "loss", "gradient_norm", "lr", "skipped", "tokens", "validation_loss", "validation_bits_per_byte")


def newest_tensors(run: Path) -> dict[str, torch.Tensor]:
    """All tensors of the run's newest checkpoint, by file and name."""
    tensors = load_checkpoint(newest_checkpoint(run / "checkpoints")).tensors
    return {f"{file}/{name}": tensor for file, named in tensors.items() for name, tensor in named.items()}


def interrupted(finished: Path, run: Path, after: int) -> Path:
    """The run as it would be if it had been killed some time after the checkpoint of step `after`."""
    shutil.copytree(finished, run)
    for path in (run / "checkpoints").iterdir():
        if int(path.name.split("-")[1]) > after:
            shutil.rmtree(path)
    for name in ("loss.png", "summary.json", "summary.md", "weights.safetensors"):
        (run / name).unlink()
    (run / "checkpoints" / ".writing-step-00000006").mkdir()
    return run
