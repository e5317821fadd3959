"""Outputs that several collectives made, tied: whichever of them a rank's loss takes, all their backward passes run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longspan.first_order import first_order


class Together(torch.autograd.Function):
    """The tensors as they are; the backward of any runs that of all, whose collectives every rank takes part in."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        outputs = tuple(x.detach() for x in tensors)
        ctx.mark_non_differentiable(*(out for out, x in zip(outputs, tensors, strict=True) if not x.requires_grad))
        return outputs

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return grads
