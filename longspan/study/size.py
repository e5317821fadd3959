"""How large the models of a study are and how long each is trained: the same for every mixer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longspan.errors import ConfigError
from longspan.study.grid import NUM_LAYERS, Cell
from longspan.train.config import Config, DataConfig, from_mapping
from longspan.train.config_checks import check


@dataclass(frozen=True)
class Size:
    """What all cells of a study have in common."""

    dim: int
    """Width of the models."""
    num_heads: int
    """Heads of a layer, of softmax layers' keys and values too."""
    hidden_dim: int
    """Width of the feed-forward layers."""
    lr: float
    """Highest learning rate, after a tenth of the steps."""
    text_steps: int
    """Optimizer steps on text."""
    text_seq_len: int
    """Tokens of a sequence of text."""
    text_batch_tokens: int
    """Tokens of a batch of text."""
    text_source: tuple[str, ...] = ("python-stdlib",)
    """Where the text comes from, as data.source of longspan train."""
    text_max_bytes: int = 12_000_000
    """Bytes of text that are read."""
    text_vocab_size: int = 2048
    """Size of the BPE's vocabulary."""
    recall_steps: int = 1
    """Optimizer steps on associative recall."""
    recall_seq_len: int = 64
    """Tokens of a sequence of associative recall."""
    recall_batch_tokens: int = 64
    """Tokens of a batch of associative recall."""
    recall_pairs: int = 8
    """Pairs of a key and a value in a sequence."""
    recall_vocab_size: int = 64
    """Number of words that keys and values are of."""

    def data(self) -> DataConfig:
        """What the text is prepared by, once for all cells."""
        return DataConfig(source=self.text_source, max_bytes=self.text_max_bytes, vocab_size=self.text_vocab_size)

    def config(self, cell: Cell, folder: Path, data: Path, threads: int) -> Config:
        """What `longspan train` is told of a cell.

        Args:
            folder: of its run.
            data: where the text is prepared.
            threads: of its process.

        Raises:
            ConfigError: for values that no run takes.
        """
        task = cell.group.task
        steps, seq_len, batch_tokens = (
            (self.text_steps, self.text_seq_len, self.text_batch_tokens)
            if task == "text"
            else (self.recall_steps, self.recall_seq_len, self.recall_batch_tokens)
        )
        mapping: dict[str, dict[str, Any]] = {
            "model": {
                "dim": self.dim,
                "num_layers": NUM_LAYERS,
                "num_heads": self.num_heads,
                "num_kv_heads": self.num_heads,
                "hidden_dim": self.hidden_dim,
                **cell.group.layers,
            },
            "parallel": {"sp": 1, "threads": threads, "device": "cpu"},
            "optim": {"lr": self.lr, "warmup_steps": max(1, steps // 10)},
            # One process has nothing to be compared with.
            "train": {
                "seed": cell.seed,
                "steps": steps,
                "seq_len": seq_len,
                "batch_tokens": batch_tokens,
                "check_tokens": 0,
            },
            "validation": {"every": 0, "sequences": VALIDATION_SEQUENCES},
            "checkpoint": {"every": max(1, math.ceil(steps / 4)), "keep": 1},
            "run": {"dir": str(folder), "go_on": True, "measure_alone": False},
        }
        if task == "text":
            mapping |= {"data": {"prepared": str(data)}, "sample": {"tokens": 0}}
        else:
            mapping |= {
                "data": {"task": "recall", "vocab_size": self.recall_vocab_size},
                "recall": {"pairs": self.recall_pairs},
            }
        config = from_mapping(mapping)
        check(config)
        return config

    def changed(self, changes: Mapping[str, Any]) -> Size:
        """This size with other values; those that are None stay."""
        return dataclasses.replace(self, **{name: value for name, value in changes.items() if value is not None})

    def as_json(self) -> dict[str, Any]:
        """The values by name, as JSON has them."""
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def of_json(cls, values: Mapping[str, Any], path: Path) -> Size:
        """What `as_json` has written into the file `path`.

        Raises:
            ConfigError: for what it has not.
        """
        names = {entry.name for entry in dataclasses.fields(cls)}
        if set(values) != names:
            odd = ", ".join(sorted(set(values) ^ names))
            raise ConfigError(f"{path} is of another version of longspan: it differs in {odd}. Give another folder")
        read: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        return cls(**read)


VALIDATION_SEQUENCES = 64
"""Held-out sequences by which each cell is judged, fewer where there is less text."""

SIZES = {
    "short": Size(
        dim=64,
        num_heads=2,
        hidden_dim=176,
        lr=3e-3,
        text_steps=100,
        text_seq_len=512,
        text_batch_tokens=2048,
        text_max_bytes=4_000_000,
        text_vocab_size=1024,
        recall_steps=300,
        recall_seq_len=32,
        recall_batch_tokens=2048,
        recall_pairs=4,
        recall_vocab_size=32,
    ),
    "night": Size(
        dim=128,
        num_heads=2,
        hidden_dim=352,
        lr=3e-3,
        text_steps=120,
        text_seq_len=1024,
        text_batch_tokens=4096,
        recall_steps=180,
        recall_seq_len=128,
        recall_batch_tokens=4096,
        recall_pairs=16,
        recall_vocab_size=128,
    ),
}
