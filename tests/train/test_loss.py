"""Loss, baseline and bits a byte by hand."""

from __future__ import annotations

import math

import numpy as np
import torch

from longspan.data.packing import PackedBatch, Sequences
from longspan.layout import ORDERS, SequenceLayout
from longspan.train.loss import Evaluation, loss_sum, unigram_baseline


class Constant(torch.nn.Module):
    """Has the same logits everywhere, gives their loss, and remembers what it was given."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.logits = torch.tensor(logits)
        self.seen = torch.empty(0)

    def forward(
        self, tokens: torch.Tensor, layout: SequenceLayout | None, labels: torch.Tensor, num_valid: int
    ) -> torch.Tensor:
        self.seen = tokens
        logits = self.logits.expand(tokens.numel(), -1)
        return torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum") / num_valid


def test_bits_per_byte_and_nats_per_token() -> None:
    evaluation = Evaluation(nats=12.0, num_tokens=4, num_bytes=6)
    assert evaluation.nats_per_token == 3.0
    assert math.isclose(evaluation.bits_per_byte, 12.0 / 6 / math.log(2))
    assert str(evaluation) == "3.000 nats/token, 2.885 bits/byte"
    assert math.isnan(Evaluation(nats=1.0, num_tokens=1, num_bytes=0).bits_per_byte)
    assert str(Evaluation(nats=0.0, num_tokens=0, num_bytes=0)) == "nan nats/token, nan bits/byte"


def test_a_uniform_model_of_bytes_takes_eight_bits_a_byte() -> None:
    tokens = torch.randint(256, (2, 11))
    total = loss_sum(Constant([0.0] * 256), PackedBatch.of(tokens), None)
    assert math.isclose(Evaluation(float(total), 20, 20).bits_per_byte, 8.0, rel_tol=1e-6)


def test_the_unigram_baseline_counts_every_token_once_more() -> None:
    train = np.array([0, 0, 0, 1], dtype=np.uint16)
    sequences = torch.tensor([[2, 0, 1], [2, 2, 0]])
    # Smoothed counts 4, 2, 1 of 7; the first token of a sequence is not predicted.
    expected = -(2 * math.log(4 / 7) + math.log(2 / 7) + math.log(1 / 7))
    baseline = unigram_baseline(np.bincount(train, minlength=3), Sequences(sequences), np.array([1, 5, 0]))
    assert math.isclose(baseline.nats, expected)
    assert (baseline.num_tokens, baseline.num_bytes) == (4, 1 + 5 + 0 + 1)


def test_the_baseline_predicts_what_the_model_does() -> None:
    sequences = torch.tensor([[2, 0, 1], [2, 2, 0]])
    counts, token_bytes = np.array([3, 1, 0]), np.array([1, 5, 0])
    # The second document of the first row begins with the token 1.
    baseline = unigram_baseline(counts, Sequences(sequences, ((2,), ())), token_bytes)
    assert math.isclose(baseline.nats, -(2 * math.log(4 / 7) + math.log(1 / 7)))
    assert (baseline.num_tokens, baseline.num_bytes) == (3, 1 + 0 + 1)


def test_the_baseline_of_the_training_text_is_its_entropy() -> None:
    train = np.repeat(np.arange(4), 10_000)
    sequences = Sequences(torch.from_numpy(train)[None])
    baseline = unigram_baseline(np.bincount(train), sequences, np.ones(4, dtype=np.int64))
    assert math.isclose(baseline.nats_per_token, math.log(4))


def test_ranks_losses_add_up_to_the_loss_of_one_process() -> None:
    logits = [0.3, -1.0, 2.0, 0.1, 0.0]
    batch = PackedBatch.of(torch.randint(5, (2, 24)))
    alone = Constant(logits)
    expected = float(loss_sum(alone, batch, None))
    assert torch.equal(alone.seen, batch.inputs)
    for order in ORDERS:
        layouts = [SequenceLayout.for_rank(23, 3, rank, order) for rank in range(3)]
        parts = [float(loss_sum(Constant(logits), batch, layout)) for layout in layouts]
        assert math.isclose(sum(parts), expected, rel_tol=1e-6)
