"""How L layers begin attention transfer: what no weight of a Llama decides, a batch of text decides, before anything is learned.

Shapes: B batch rows, T tokens of this rank, C channels of the residual stream.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from longspan.data.packing import PackedBatch
from longspan.layout import SequenceLayout
from longspan.models import LinearLlama3
from longspan.models.conversion.recipes import OPEN_GATES, RECIPES
from longspan.models.mixers.softmax import SoftmaxMixer
from longspan.train.layer_tasks import LayerTask, layer_tasks, sums_over_ranks

_OPEN = 1.2784645427610738
"""Where silu is 1."""
_RIDGE = 1e-2
"""Added to the channels' squares, as a share of their mean."""
_WORTH = 0.1
"""By which the error, a share of the wanted output's square, must fall for a layer to take another size."""


@torch.no_grad()
def calibrate(
    model: LinearLlama3, teachers: Mapping[int, SoftmaxMixer], batch: PackedBatch, layout: SequenceLayout
) -> None:
    """Open the gates of the L layers that `OPEN_GATES` names, and give outputs behind a norm the size that is nearest.

    Args:
        model, teachers, batch, layout: as in `layer_tasks`; every rank makes this call, and comes to the same weights.
    """
    for task in layer_tasks(model, teachers, batch, layout):
        mixer, operator = task.block.mixer, model.config.layer_operators[task.number]
        if operator in OPEN_GATES:
            mixer.get_parameter(OPEN_GATES[operator]).copy_(_nearly_constant(task.given, layout) * _OPEN)
        if "norm.weight" in RECIPES[operator]:
            mixer.get_parameter("norm.weight").mul_(_nearest_size(task, layout))


def _nearly_constant(x: Tensor, layout: SequenceLayout) -> Tensor:
    """The weights ``[C]`` by which tokens ``[B, T, C]`` give what is 1 on average, and varies least.

    Gates have no bias. What comes out of a Llama's norm has a mean, however, and directions in which it varies little beside that:
    of all maps w with w · mean = 1 this is the one with the least mean square.
    """
    rows = x.flatten(0, 1).double()
    count = rows.new_full((1, rows.shape[1]), float(len(rows)))
    whole = sums_over_ranks(torch.cat([rows.T @ rows, rows.sum(0, keepdim=True), count]), layout)
    squares, mean = whole[:-2] / whole[-1], whole[-2] / whole[-1]
    squares.diagonal().add_(_RIDGE * squares.diagonal().mean())
    weights = torch.linalg.solve(squares, mean)
    return (weights / (weights @ mean)).to(x.dtype)


def _nearest_size(task: LayerTask, layout: SequenceLayout) -> float:
    """What a layer's output is to be multiplied by, to be the nearest to what is wanted; 1 where that is little nearer."""
    got, wanted = task.output().double(), task.wanted.double()
    sums = torch.stack([(got * wanted).sum(), got.square().sum(), wanted.square().sum()])
    both, own, theirs = sums_over_ranks(sums, layout).tolist()
    if not (both > 0 and own > 0 and theirs > 0):
        return 1.0
    gain = (own - 2 * both + both**2 / own) / theirs
    return both / own if gain > _WORTH else 1.0
