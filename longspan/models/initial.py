"""Initial weights: Llama's, drawn on the CPU from a seed, the same on every device and rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

STD = 0.02


class InitialWeights:
    """Draws matrices one after another, so that the order of the calls is part of what a seed means.

    Matrices are normal with deviation 0.02, those that write into the residual stream with 0.02 / √(2 · num_layers).
    """

    def __init__(self, seed: int, num_layers: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._residual_std = STD / (2 * num_layers) ** 0.5

    @torch.no_grad()
    def draw(self, weight: Tensor, residual: bool = False) -> None:
        """Fill a matrix, in place; `residual` says that it writes into the residual stream."""
        std = self._residual_std if residual else STD
        weight.copy_(torch.empty(weight.shape).normal_(std=std, generator=self._generator))

    @torch.no_grad()
    def fill(self, module: nn.Module, residual: Iterable[nn.Module] = ()) -> None:
        """Initialise a module and all that it is made of, in the order of `modules()`.

        Linear maps and embeddings are drawn; any other module with a ``reset_parameters`` of its own, such as a norm or a gate,
        knows its initial values.
        """
        writing = {id(x) for x in residual}
        for part in module.modules():
            if isinstance(part, nn.Linear | nn.Embedding):
                self.draw(part.weight, id(part) in writing)
            else:
                reset: Callable[[], None] | None = getattr(part, "reset_parameters", None)
                if reset is not None:
                    reset()
