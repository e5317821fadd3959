"""What L layers are to give: outputs of the softmax layers whose places they have taken, for what these are given in the Llama.

Shapes: B batch rows, T tokens of this rank, C channels of the residual stream.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from longspan.comm.collectives import all_reduce
from longspan.data.packing import PackedBatch
from longspan.dtypes import accumulation_dtype
from longspan.layout import SequenceLayout
from longspan.models import LinearLlama3
from longspan.models.block import HybridBlock
from longspan.models.mixers import Context
from longspan.models.mixers.softmax import SoftmaxMixer
from longspan.models.rotary import rotation


@dataclass(frozen=True)
class LayerTask:
    """An L layer by its number in the model, and what it is to give for what: `given` and `wanted` are ``[B, T, C]``.

    handed: what the first layer of its kind hands on, if its mixer takes that.
    """

    model: LinearLlama3
    number: int
    given: Tensor
    wanted: Tensor
    context: Context
    handed: Tensor | None = None

    @property
    def block(self) -> HybridBlock:
        """That the layer is in."""
        return cast(HybridBlock, self.model.blocks[self.number])

    def output(self) -> Tensor:
        """What it gives, ``[B, T, C]``."""
        # What layers share is made once for each, whose graph the next one then does not need.
        shared = {name: module() for name, module in self.model.shared.items()}
        context = dataclasses.replace(self.context, shared=shared)
        found, *_ = self.block.mixer(self.given, context, self.handed)
        return found


def layer_tasks(
    model: LinearLlama3, teachers: Mapping[int, SoftmaxMixer], batch: PackedBatch, layout: SequenceLayout
) -> Iterator[LayerTask]:
    """The tasks of all L layers, one after another: the softmax layers' outputs go on to the next, and not those of L layers.

    teachers: the softmax layer that each L layer is to become, by the layer's number. layout: which tokens of the batch this rank
    takes; the layers were parallelized for its group.
    """
    positions = layout.document_positions_on(batch.inputs.device)
    config = model.config
    dtype = accumulation_dtype(model.norm.weight.dtype)
    angles = rotation(positions, config.size_of_head, config.rope_theta, dtype, config.rope_scaling)
    context = Context(layout, positions, angles)
    with torch.no_grad():
        x = model.embedding(layout.shard(batch.inputs))
    handed: dict[str, Tensor] = {}
    for number, entry in enumerate(model.blocks):
        block = cast(HybridBlock, entry)
        teacher = teachers.get(number)
        with torch.no_grad():
            given = block.mixer_norm(x)
            if block.mixer.hands_on:
                # As its first layer has it now: what later ones take of it does not teach it.
                *_, handed[block.mixer.name] = block.mixer(given, context)
            wanted, *_ = (block.mixer if teacher is None else teacher)(given, context)
        if teacher is not None:
            own = handed[block.mixer.name] if block.mixer.takes_on else None
            yield LayerTask(model, number, given, wanted, context, own)
        with torch.no_grad():
            x = x + wanted
            fed, _ = block.feed_forward(block.feed_forward_norm(x), context)
            x = x + fed


def sums_over_ranks(sums: Tensor, layout: SequenceLayout) -> Tensor:
    """Sums over this rank's tokens, as sums over those of all ranks."""
    if layout.num_ranks == 1:
        return sums
    assert layout.group is not None
    return all_reduce(sums, layout.group, "forward")
