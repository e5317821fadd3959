"""What a rank computes in a step: its micro batches, each with the layout of its documents, ready before the step begins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from longspan.data.batches import Batches
from longspan.data.packing import PackedBatch
from longspan.layout import Order, SequenceLayout
from longspan.train.ranks import Ranks

LayoutOf = Callable[[int, Sequence[int] | None], SequenceLayout]
"""The layout of this rank for a sequence of so many tokens with these documents, or none."""


def layouts_over(
    ranks: Ranks, order: Order, weights: Sequence[float] | None = None, rank_order: Sequence[int] | None = None
) -> LayoutOf:
    """What makes this rank's layouts of the sequences that it shares with others; the rest as `SequenceLayout` takes it."""

    def layout_of(seq_len: int, documents: Sequence[int] | None) -> SequenceLayout:
        if ranks.mesh is None:
            return SequenceLayout.local(seq_len, documents)
        return SequenceLayout(seq_len, ranks.mesh["sp"], order, documents, weights=weights, rank_order=rank_order)

    return layout_of


@dataclass(frozen=True)
class StepBatch:
    """This rank's micro batches of a step, with their layouts, and what every rank knows of the whole global batch.

    num_valid_tokens: what the step's loss is divided by. tokens_by_document_length: int64 ``[64]``, by powers of two.
    """

    micro_batches: tuple[tuple[PackedBatch, SequenceLayout], ...]
    num_valid_tokens: int
    tokens_by_document_length: np.ndarray


def make_step_batch(
    batches: Batches, step: int, ranks: Ranks, rows_at_once: int | None, layout_of: LayoutOf
) -> StepBatch:
    """Read this rank's rows of the global batch of `step`; rows_at_once: rows of a micro batch, None is all."""
    rows = batches.batch_sequences // ranks.dp
    own = batches.batch(step, ranks.dp_rank * rows, rows)
    at_once = rows_at_once or rows
    micro_batches = []
    for first in range(0, rows, at_once):
        packed = own.rows(first, min(at_once, rows - first)).packed()
        if ranks.device.type == "cuda":
            packed = packed.pinned()
        micro_batches.append((packed, layout_of(packed.seq_len, packed.documents)))
    return StepBatch(tuple(micro_batches), batches.num_valid_tokens(step), batches.tokens_by_document_length(step))
