"""The loss, by the one gradient convention; evaluation; the unigram baseline.

A rank's loss is the sum over its own valid tokens, divided by the number of valid tokens of all ranks (data x
sequence). Parameter gradients are then summed over all ranks, and equal those of one process.

Shapes: B sequences of this rank, N tokens of a sequence, T_local tokens of it on this rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from longspan.layout import SequenceLayout
from longspan.parallel.sharded import free_gathered
from longspan.train.ranks import Ranks

IGNORED = -100


@dataclass(frozen=True)
class Evaluation:
    """A loss over `num_tokens` predicted tokens that stand for `num_bytes` bytes of text."""

    nats: float
    num_tokens: int
    num_bytes: int

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.num_tokens

    @property
    def bits_per_byte(self) -> float:
        """Independent of the tokenizer: what it takes to write down a byte of the text."""
        return self.nats / math.log(2.0) / self.num_bytes if self.num_bytes else math.nan

    def __str__(self) -> str:
        return f"{self.nats_per_token:.3f} nats/token, {self.bits_per_byte:.3f} bits/byte"


def loss_sum(model: Any, tokens: Tensor, layout: SequenceLayout | None) -> Tensor:
    """Sum of the cross-entropies of this rank's tokens, in nats: a float32 scalar.

    Args:
        model: takes tokens ``[B, T_local]`` and `layout`, gives logits ``[B, T_local, vocab_size]``.
        tokens: int64 ``[B, N + 1]``, whole sequences and the token that follows each.
        layout: which tokens this rank holds; None is all of them.
    """
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    if layout is not None:
        inputs, labels = layout.shard(inputs), layout.shard_labels(tokens, ignore_index=IGNORED)
    logits = model(inputs, layout=layout)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")


@torch.no_grad()
def evaluate(
    model: Any, sequences: Tensor, token_bytes: np.ndarray, layout: SequenceLayout, ranks: Ranks
) -> Evaluation:
    """The loss on `sequences`, int64 ``[n, N + 1]``; the same sequences and result on every rank.

    Ranks of one `dp_rank` compute one sequence together, those of the others the next ones.
    """
    total = 0.0
    for first in range(0, len(sequences), ranks.dp):
        row = first + ranks.dp_rank
        if row < len(sequences):
            total += float(loss_sum(model, sequences[row : row + 1].to(ranks.device), layout))
        elif ranks.degrees.shards_weights:
            # The other ranks gather this one's share of the weights.
            loss_sum(model, sequences[first : first + 1].to(ranks.device), layout)
    free_gathered(model)
    nats = float(ranks.gather_numbers([total]).sum())
    return Evaluation(nats, sequences[:, 1:].numel(), count_bytes(sequences[:, 1:], token_bytes))


def unigram_baseline(
    train_tokens: np.ndarray, vocab_size: int, sequences: Tensor, token_bytes: np.ndarray
) -> Evaluation:
    """The loss of predicting every token of `sequences` by its frequency in the training text, each count plus one."""
    counts = np.bincount(train_tokens, minlength=vocab_size).astype(np.float64) + 1.0
    nats = -np.log(counts / counts.sum())
    targets = sequences[:, 1:].numpy()
    return Evaluation(float(nats[targets].sum()), targets.size, count_bytes(sequences[:, 1:], token_bytes))


def count_bytes(targets: Tensor, token_bytes: np.ndarray) -> int:
    """Bytes of text that the tokens of `targets` stand for."""
    return int(token_bytes[targets.numpy()].sum())
