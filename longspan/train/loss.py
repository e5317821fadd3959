"""The loss, by the one gradient convention; evaluation; the unigram baseline.

A rank's loss is the sum over its own valid tokens, divided by the number of valid tokens of all ranks (data x
sequence). Parameter gradients are then summed over all ranks, and equal those of one process.

Valid are the tokens that have a label: with documents all but the last of each. How many they are is known from the data alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from longspan.data.packing import IGNORED, PackedBatch, Sequences
from longspan.layout import SequenceLayout
from longspan.models import Routing, TokenScores
from longspan.parallel.sharded import accumulating, free_gathered
from longspan.streaming import Stream
from longspan.streaming.engine import Between
from longspan.train.ranks import Ranks
from longspan.train.segments import Segmentation
from longspan.train.step_batch import LayoutOf


@dataclass(frozen=True)
class Evaluation:
    """A loss over `num_tokens` predicted tokens that stand for `num_bytes` bytes of text.

    num_right: how many of them are the likeliest token, where a task asks for that; what a guess gets right need not be whole.
    """

    nats: float
    num_tokens: int
    num_bytes: int
    num_right: float | None = None

    @property
    def nats_per_token(self) -> float:
        """NaN where nothing was predicted."""
        return self.nats / self.num_tokens if self.num_tokens else math.nan

    @property
    def bits_per_byte(self) -> float:
        """Independent of the tokenizer: what it takes to write down a byte of the text."""
        return self.nats / math.log(2.0) / self.num_bytes if self.num_bytes else math.nan

    @property
    def accuracy(self) -> float | None:
        """Share of the tokens that are predicted right; None where nobody asks for it."""
        return None if self.num_right is None or not self.num_tokens else self.num_right / self.num_tokens

    @property
    def numbers(self) -> dict[str, float]:
        """What metrics and summaries have of it, by name; NaN where nothing was predicted."""
        if self.num_right is None:
            return {"loss": self.nats_per_token, "bits_per_byte": self.bits_per_byte}
        return {"loss": self.nats_per_token, "accuracy": math.nan if self.accuracy is None else self.accuracy}

    def __str__(self) -> str:
        if self.num_right is not None:
            return f"{self.nats_per_token:.3f} nats/answer, accuracy {self.num_right / max(1, self.num_tokens):.1%}"
        return f"{self.nats_per_token:.3f} nats/token, {self.bits_per_byte:.3f} bits/byte"


def loss_sum(model: Any, batch: PackedBatch, layout: SequenceLayout | None) -> Tensor:
    """Sum of the cross-entropies of this rank's tokens, in nats: a float32 scalar.

    Args:
        model: takes tokens and labels ``[B, T_local]``, `layout` and `num_valid`, and gives the sum of the cross-entropies divided
            by `num_valid`.
        batch: whole sequences, the same on every rank of the layout.
        layout: which tokens this rank holds, and of which documents; None is all of them, as one document.
    """
    inputs, labels = (batch.inputs, batch.labels) if layout is None else own_tokens(batch, layout)
    total: Tensor = model(inputs, layout=layout, labels=labels, num_valid=1)
    return total


def loss_share(
    model: Any,
    batch: PackedBatch,
    layout: SequenceLayout | None,
    num_valid: int,
    routing: Routing | None = None,
) -> Tensor:
    """This rank's share of the loss that is trained on: of the mean cross-entropy, in nats, and of what routers of experts add.

    Args:
        model, batch, layout: as in `loss_sum`.
        num_valid: tokens of all ranks and micro batches that have a label.
        routing: of a model with experts, is told of its routers.
    """
    inputs, labels = (batch.inputs, batch.labels) if layout is None else own_tokens(batch, layout)
    told = {} if routing is None else {"routing": routing}
    # A batch of documents of one token has nothing to predict.
    share: Tensor = model(inputs, layout=layout, labels=labels, num_valid=num_valid, **told)
    return share


def forward_backward(
    model: nn.Module,
    batch: PackedBatch,
    layout: SequenceLayout,
    num_valid: int,
    segments: Segmentation | None = None,
    routing: Routing | None = None,
    *,
    is_last: bool = True,
    between: Between | None = None,
) -> Tensor:
    """Add the gradients of this rank's share of the loss, which is returned without its graph.

    Args:
        batch: on the model's device. layout, num_valid, routing: as of `loss_share`.
        segments: None is none.
        is_last, between: as of `longspan.streaming.Stream.forward_backward`.
    """
    if segments is None:
        loss = loss_share(model, batch, layout, num_valid, routing)
        with accumulating(model, is_last):
            loss.backward()
        return loss.detach()
    return segments.stream(model).forward_backward(
        batch.inputs, batch.labels, layout, num_valid=num_valid, routing=routing, is_last=is_last, between=between
    )


def own_tokens(batch: PackedBatch, layout: SequenceLayout) -> tuple[Tensor, Tensor]:
    """This rank's inputs and labels ``[B, T_local]``: labels were shifted before the split."""
    return layout.shard(batch.inputs), layout.shard(batch.labels)


@torch.no_grad()
def evaluate(
    model: Any,
    sequences: Sequences,
    token_bytes: np.ndarray,
    layout_of: LayoutOf,
    ranks: Ranks,
    segments: Segmentation | None = None,
    pass_ended: Callable[[], None] = lambda: None,
) -> Evaluation:
    """The loss on `sequences`, and where these are of a task how much is right; the same sequences and result on every rank.

    Ranks of one `dp_rank` compute one sequence together, those of the others the next ones. segments: of time, where sequences are
    not computed whole. pass_ended: called after each pass over a segment.
    """
    total = torch.zeros(2, dtype=torch.float64)
    for first in range(0, len(sequences), ranks.dp):
        row = first + ranks.dp_rank
        if row < len(sequences):
            total += _score_of_row(model, sequences, row, layout_of, ranks, segments, pass_ended)
        elif ranks.degrees.shards_weights:
            # The other ranks gather this one's share of the weights.
            _score_of_row(model, sequences, first, layout_of, ranks, segments, pass_ended)
    free_gathered(model)
    nats, num_right = ranks.gather_numbers(total.tolist()).sum(0).tolist()
    return Evaluation(
        nats,
        sequences.num_valid_tokens,
        count_bytes(sequences, token_bytes),
        None if sequences.predicts is None else num_right,
    )


def _score_of_row(
    model: Any,
    sequences: Sequences,
    row: int,
    layout_of: LayoutOf,
    ranks: Ranks,
    segments: Segmentation | None,
    pass_ended: Callable[[], None],
) -> Tensor:
    """This rank's sum of losses, in nats, and of a task how many labels are the likeliest: float64 ``[2]``."""
    batch = sequences.rows(row, 1).packed().to(ranks.device)
    layout = layout_of(batch.seq_len, batch.documents)
    if segments is not None:
        return _score_in_segments(segments.stream(model), batch, layout, sequences.predicts is not None, pass_ended)
    if sequences.predicts is None:
        return torch.tensor([float(loss_sum(model, batch, layout)), 0.0], dtype=torch.float64)
    inputs, labels = own_tokens(batch, layout)
    return _sums(model(inputs, layout=layout, labels=labels, token_scores=True))


def _score_in_segments(
    streamed: Stream, batch: PackedBatch, layout: SequenceLayout, of_a_task: bool, pass_ended: Callable[[], None]
) -> Tensor:
    whole = (batch.inputs, batch.labels, layout)
    if not of_a_task:
        nats = streamed.loss(*whole, num_valid=1, between=lambda _: pass_ended())
        return torch.tensor([float(nats), 0.0], dtype=torch.float64)
    total = torch.zeros(2, dtype=torch.float64)
    for scores in streamed.scores(*whole):
        total += _sums(scores)
        pass_ended()
    return total


def _sums(scores: TokenScores) -> Tensor:
    return torch.tensor([float(scores.nats.double().sum()), float(scores.is_likeliest.sum())], dtype=torch.float64)


def unigram_baseline(token_counts: np.ndarray, sequences: Sequences, token_bytes: np.ndarray) -> Evaluation:
    """The loss of predicting every label of `sequences` by its frequency in the training text, each count plus one.

    token_counts: of each token of the vocabulary in the training text, ``[vocab_size]``.
    """
    counts = token_counts.astype(np.float64) + 1.0
    nats = -np.log(counts / counts.sum())
    targets = _targets(sequences)
    return Evaluation(float(nats[targets].sum()), targets.size, count_bytes(sequences, token_bytes))


def count_bytes(sequences: Sequences, token_bytes: np.ndarray) -> int:
    """Bytes of text that the labels of `sequences` stand for."""
    return int(token_bytes[_targets(sequences)].sum())


def _targets(sequences: Sequences) -> np.ndarray:
    labels = sequences.labels.numpy()
    return labels[labels != IGNORED]
