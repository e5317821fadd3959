"""Attention transfer: L layers are trained to give what the softmax layers gave whose places they have taken.

The first stage of LoLCATs (arXiv 2410.10254), which trains feature maps so; here it is all that a mixer has. Layers learn beside
one another, and none of them what another one gets wrong (`longspan.train.layer_tasks`). Over ranks both kinds of layers mix the
tokens of one layout, and a rank's error is its share: the sum over its own tokens, divided by the square of what the softmax layer
gives for all of them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from longspan.data.batches import TrainingBatches, validation_sequences
from longspan.data.packing import Documents, PackedBatch, Sequences
from longspan.data.prepared import PreparedData
from longspan.errors import ConfigError, LongspanError
from longspan.launch import Place
from longspan.layout import Order, SequenceLayout
from longspan.models import LinearLlama3
from longspan.models.block import HybridBlock
from longspan.models.mixers.softmax import SoftmaxMixer
from longspan.parallel import parallelize, sum_gradients, unparallelize
from longspan.train.calibration import calibrate
from longspan.train.config import OptimConfig
from longspan.train.layer_tasks import layer_tasks, sums_over_ranks
from longspan.train.optimizer import build_optimizer, clip_gradients, gradient_norm, learning_rate, set_learning_rate
from longspan.train.ranks import Ranks
from longspan.train.step_batch import LayoutOf, layouts_over

_TINY = 1e-30


class TransferError(LongspanError):
    """Attention transfer cannot go on: an error that is not finite."""


@dataclass(frozen=True)
class Transfer:
    """How long, on how much, and how fast layers learn."""

    steps: int = 0
    """Optimizer steps; 0 leaves the stage out."""
    seq_len: int = 512
    """Tokens of a sequence."""
    batch_tokens: int = 4096
    """Tokens of a batch."""
    lr: float = 3e-3
    """Highest learning rate of a layer that begins with an error of 1 or more; one that begins nearer has the root of its error of
    that. The first half of the steps, 20 at most, lead up to it, and half a cosine down to a tenth of it."""
    validation_sequences: int = 8
    """Held-out sequences that the errors before and after are taken on."""
    calibrate: bool = True
    """Open gates and set the sizes of outputs on the first batch, before the first step."""

    def check(self) -> None:
        """Raise ConfigError for values that make no training."""
        least = {"steps": 0, "seq_len": 1, "batch_tokens": 1, "validation_sequences": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ConfigError(f"transfer.{name} is {getattr(self, name)}; it must be at least {value}")
        if not 0 < self.lr < math.inf:
            raise ConfigError(f"transfer.lr is {self.lr}; it must be a number greater than 0")
        if self.batch_tokens % self.seq_len:
            raise ConfigError(
                f"transfer.batch_tokens {self.batch_tokens} is no multiple of transfer.seq_len {self.seq_len}: a batch holds whole "
                "sequences. Change one of them"
            )


@dataclass(frozen=True)
class Transferred:
    """Errors of each L layer by its number, before and after.

    An error is the squared distance from what the softmax layer gives, as a share of that output's own square: 0 is the same, and 1
    what an output of zero has. On held-out text.
    """

    before: Mapping[int, float]
    after: Mapping[int, float]


def transfer_attention(
    model: LinearLlama3,
    teachers: Mapping[int, SoftmaxMixer],
    data: PreparedData,
    transfer: Transfer,
    documents: Documents,
    seed: int,
    say: Callable[[int, float], None],
    ranks: Ranks | None = None,
    order: Order = "zigzag",
) -> Transferred:
    """Train the L layers of a model, in place; everything else stays as it is.

    Args:
        model: on the CPU or a GPU, made of the teachers' model; the same on every rank, before and afterwards.
        teachers: the softmax layer that each L layer is to become, by the layer's number; on the same device.
        data: what they learn on.
        documents: whether memory starts anew with each of them.
        say: called after each step with its number, from 1, and the mean of the layers' errors.
        ranks: that share each sequence; None is this process alone. order: which tokens of it a rank takes.

    Raises:
        DataError: for too little text.
        TransferError: where an error is not finite.
    """
    ranks = ranks or Ranks(Place(), model.norm.weight.device)
    with _over(ranks, model, nn.ModuleList(teachers.values())):
        return _transfer(model, teachers, data, transfer, documents, seed, say, ranks, layouts_over(ranks, order))


@contextlib.contextmanager
def _over(ranks: Ranks, *modules: nn.Module) -> Iterator[None]:
    """Inside, the layers of these modules mix the tokens of ranks that share a sequence."""
    if ranks.mesh is None:
        yield
        return
    for module in modules:
        parallelize(module, ranks.mesh["sp"])
    try:
        yield
    finally:
        for module in modules:
            unparallelize(module)


def _transfer(
    model: LinearLlama3,
    teachers: Mapping[int, SoftmaxMixer],
    data: PreparedData,
    transfer: Transfer,
    documents: Documents,
    seed: int,
    say: Callable[[int, float], None],
    ranks: Ranks,
    layout_of: LayoutOf,
) -> Transferred:
    batches = TrainingBatches(
        (data.train,), transfer.seq_len, transfer.batch_tokens // transfer.seq_len, seed, documents
    )
    held_out = validation_sequences(
        data.validation, transfer.seq_len, transfer.validation_sequences, least=ranks.sp, documents=documents
    )
    learning = nn.ModuleList([cast(HybridBlock, model.blocks[layer]).mixer for layer in teachers])
    learning.append(model.shared)
    warmup = min(20, math.ceil(transfer.steps / 2))
    config = OptimConfig(lr=transfer.lr, warmup_steps=warmup, weight_decay=0.0)
    device = model.norm.weight.device
    if transfer.calibrate:
        first = batches.batch(0).packed().to(device)
        calibrate(model, teachers, first, layout_of(first.seq_len, first.documents))
    before = _errors_on(model, teachers, held_out, device, layout_of)
    learners = _learners(model, before, config)
    for step in range(transfer.steps):
        batch = batches.batch(step).packed().to(device)
        errors = layer_errors(model, teachers, batch, layout_of(batch.seq_len, batch.documents), learns=True)
        if ranks.mesh is not None:
            sum_gradients(learning, ranks.mesh["sp"])
        norm = gradient_norm(learning)
        mean = sum(float(error) for error in errors.values()) / len(errors)
        if not math.isfinite(mean) or not math.isfinite(float(norm)):
            raise TransferError(
                f"attention transfer: step {step + 1} has an error of {mean} and gradients of the norm {float(norm)}. Lower "
                f"transfer.lr, which is {transfer.lr}"
            )
        clip_gradients(learning, norm, config.clip_norm)
        for optimizer, share in learners:
            set_learning_rate(optimizer, share * learning_rate(config, step + 1, transfer.steps))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        say(step + 1, mean)
    return Transferred(before, _errors_on(model, teachers, held_out, device, layout_of))


def _learners(
    model: LinearLlama3, before: Mapping[int, float], config: OptimConfig
) -> list[tuple[torch.optim.Optimizer, float]]:
    """An optimizer for each L layer, and one for what they share; and the share of the learning rate that each takes.

    AdamW moves weights by about the learning rate, however near a layer is: steps that bring a far layer nearer lead a near one
    away. So a layer's share is the distance that it begins with, the root of its error, and that of what layers share the least.

    before: the errors that the layers begin with, by their numbers.
    """
    shares = {layer: min(1.0, math.sqrt(error)) for layer, error in before.items()}
    learning: list[tuple[nn.Module, float]] = [
        (cast(HybridBlock, model.blocks[layer]).mixer, share) for layer, share in shares.items()
    ]
    if any(parameter.requires_grad for parameter in model.shared.parameters()):
        learning.append((model.shared, min(shares.values())))
    return [(build_optimizer(weights, config), share) for weights, share in learning]


def layer_errors(
    model: LinearLlama3,
    teachers: Mapping[int, SoftmaxMixer],
    batch: PackedBatch,
    layout: SequenceLayout,
    learns: bool,
) -> dict[int, Tensor]:
    """The error of each L layer on a batch, as in `Transferred`: float32 scalars without gradient, the same on every rank.

    layout: which tokens of the batch this rank takes; the layers were parallelized for its group. learns: add the gradients of this
    rank's share of the sum of the errors to the weights of these layers; the ranks' sum is then the whole gradient.
    """
    errors: dict[int, Tensor] = {}
    for task in layer_tasks(model, teachers, batch, layout):
        with torch.set_grad_enabled(learns):
            distance = (task.output() - task.wanted).square().sum()
        whole = sums_over_ranks(torch.stack([distance.detach(), task.wanted.square().sum()]), layout)
        size = whole[1].clamp(min=_TINY)
        if learns:
            (distance / size).backward()
        errors[task.number] = whole[0] / size
    return errors


def _errors_on(
    model: LinearLlama3,
    teachers: Mapping[int, SoftmaxMixer],
    sequences: Sequences,
    device: torch.device,
    layout_of: LayoutOf,
) -> dict[int, float]:
    """The mean over sequences of the error of each L layer."""
    totals = dict.fromkeys(teachers, 0.0)
    for row in range(len(sequences)):
        batch = sequences.rows(row, 1).packed().to(device)
        layout = layout_of(batch.seq_len, batch.documents)
        for layer, error in layer_errors(model, teachers, batch, layout, learns=False).items():
            totals[layer] += float(error) / len(sequences)
    return totals
