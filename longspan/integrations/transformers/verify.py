"""The self-check of `longspan.parallelize`: a short batch against the same model in one process, before and after."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from longspan.comm.collectives import all_reduce
from longspan.errors import InputError
from longspan.models.mixers import SequenceParallel

TOKENS_PER_RANK = 19
"""Length of the batch for each rank: odd, and longer than a short convolution."""

TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-2}
"""Largest error of a gradient relative to its own largest entry; Transformers computes norms and gates in float32."""

_TOLERANCE_OF_HALF = 0.25

NOISE = 1e-3
"""A gradient smaller than this part of the largest is compared with that part: rounding may be all that it is."""


@dataclass(frozen=True)
class Reference:
    """Loss and gradients of a batch of random tokens, computed in one process by the model as it was."""

    place: SequenceParallel
    tokens: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]

    @classmethod
    def of(cls, head: nn.Module, place: SequenceParallel) -> Reference:
        """Run the unmodified model."""
        length = place.num_ranks * TOKENS_PER_RANK
        config: Any = head.config
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, config.get_text_config().vocab_size, (1, length), generator=generator)
        parameter = next(head.parameters())
        loss, gradients = _loss_and_gradients(head, tokens.to(parameter.device), use_cache=False)
        return cls(place, tokens.to(parameter.device), loss, gradients)

    def compare(self, head: nn.Module) -> None:
        """Run the parallelized model, and raise where it differs.

        Raises:
            InputError: naming what differs most, on every rank.
        """
        loss, gradients = _loss_and_gradients(head, self.tokens)
        group, num_ranks = self.place.group, self.place.num_ranks
        # What a rank returns stands for all ranks' average or sum; without gradients it is the loss itself.
        with torch.no_grad():
            loss = head(input_ids=self.tokens, labels=self.tokens).loss
        scale = num_ranks if _averages(head) else 1
        worst, error = "the loss", _relative(loss, self.loss, 0.0)
        largest = max((float(expected.abs().max()) for expected in self.gradients.values()), default=0.0)
        for name, expected in self.gradients.items():
            own = gradients[name] / scale
            summed = all_reduce(own, group, "backward") if num_ranks > 1 else own
            of_this = _relative(summed, expected, NOISE * largest)
            if not of_this <= error:
                worst, error = f"the gradient of {name}", of_this
        tolerance = TOLERANCES.get(self.loss.dtype, _TOLERANCE_OF_HALF)
        if next(head.parameters()).dtype not in TOLERANCES:
            tolerance = _TOLERANCE_OF_HALF
        if not error <= tolerance:
            raise InputError(
                f"{type(head).__name__} over {num_ranks} ranks differs from one process: {worst} by {error:.1e} of its size, "
                f"more than {tolerance:.0e}, for {self.tokens.shape[1]} random tokens. Do not train it so; see "
                "docs/transformers.md for what is supported"
            )


def _averages(head: nn.Module) -> bool:
    from longspan.integrations.transformers.model import state_of

    state = state_of(head)
    return state is not None and state.loss == "mean"


def _loss_and_gradients(head: nn.Module, tokens: Tensor, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    training = [module for module in head.modules() if module.training]
    head.eval()
    trained = {name: parameter for name, parameter in head.named_parameters() if parameter.requires_grad}
    try:
        with torch.enable_grad():
            loss = head(input_ids=tokens, labels=tokens, **options).loss
            found: tuple[Tensor | None, ...] = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    finally:
        for module in training:
            module.training = True
    gradients = {
        name: torch.zeros_like(parameter) if gradient is None else gradient.detach()
        for (name, parameter), gradient in zip(trained.items(), found, strict=True)
    }
    return loss.detach(), gradients


def _relative(got: Tensor, expected: Tensor, floor: float) -> float:
    if not bool(torch.isfinite(got).all()):
        return float("inf")
    size = max(float(expected.abs().max()), floor, torch.finfo(expected.dtype).tiny)
    return float((got - expected).abs().max()) / size
