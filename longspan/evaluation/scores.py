"""Rows of tokens scored over the ranks that share them: what every evaluation adds up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longspan.data.packing import PackedBatch, Sequences
from longspan.layout import SequenceLayout
from longspan.models import TokenScores
from longspan.train.loss import own_tokens
from longspan.train.ranks import Ranks
from longspan.train.step_batch import LayoutOf


@dataclass(frozen=True)
class RowScores:
    """What became of the labels of each row, the same on every rank.

    nats: sum of their cross-entropies, float64 ``[B]``. num_right: how many are the likeliest token, int64 ``[B]``. num_labels: how
    many there are, int64 ``[B]``.
    """

    nats: np.ndarray
    num_right: np.ndarray
    num_labels: np.ndarray

    @property
    def is_right(self) -> np.ndarray:
        """Whether all labels of a row are the likeliest tokens, bool ``[B]``.

        Greedy decoding behind a prompt then writes just these, as each of them is likeliest behind those before it.
        """
        return self.num_right == self.num_labels


@torch.no_grad()
def score_tokens_of(model: Any, batch: PackedBatch, layout: SequenceLayout, ranks: Ranks) -> TokenScores:
    """The scores of this rank's tokens, ``[B, T_local]``, on the CPU."""
    inputs, labels = own_tokens(batch.to(ranks.device), layout)
    nats, is_likeliest = model(inputs, layout=layout, labels=labels, token_scores=True)
    return TokenScores(nats.cpu(), is_likeliest.cpu())


def score_rows(model: Any, sequences: Sequences, layout_of: LayoutOf, ranks: Ranks, rows_at_once: int = 1) -> RowScores:
    """Score the rows, which have no documents in them, `rows_at_once` of them in a forward; on every rank the same rows."""
    own = torch.zeros(2, len(sequences), dtype=torch.float64)
    for first in range(0, len(sequences), rows_at_once):
        batch = sequences.rows(first, rows_at_once).packed()
        scores = score_tokens_of(model, batch, layout_of(batch.seq_len, None), ranks)
        own[:, first : first + rows_at_once] = torch.stack([sum_of_rows(x) for x in scores])
    nats, num_right = ranks.gather_numbers(own.flatten().tolist()).sum(0).view(2, -1).numpy()
    num_labels = (sequences.labels >= 0).sum(1).numpy()
    return RowScores(nats, num_right.astype(np.int64), num_labels)


def sum_of_rows(x: Tensor) -> Tensor:
    """``[B, T]`` to float64 ``[B]``."""
    return x.double().sum(1)
