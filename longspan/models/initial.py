"""Initial weights: Llama's, drawn on the CPU from a seed, the same on every device and rank."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

STD = 0.02

Whole = Callable[[nn.Module], AbstractContextManager[Any]]
"""``with whole(module):`` has a module's own parameters whole, to be set; afterwards each rank has its share of what was set."""


class DrawnModule(nn.Module, ABC):
    """A module whose own parameters are drawn at random, otherwise than those of linear maps are."""

    @abstractmethod
    def draw_parameters(self, generator: torch.Generator) -> None:
        """Set the module's own parameters, on whatever device they are, from draws on the CPU; without gradients."""


class InitialWeights:
    """Draws matrices one after another, so that the order of the calls is part of what a seed means.

    Matrices are normal with deviation 0.02, those that write into the residual stream with 0.02 / √(2 · num_layers). What is on the
    meta device has no values, and is left.

    whole: a context for each module, in which its own parameters are whole, where they are divided over ranks.
    """

    def __init__(self, seed: int, num_layers: int, whole: Whole = nullcontext) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._residual_std = STD / (2 * num_layers) ** 0.5
        self._whole = whole

    @torch.no_grad()
    def draw(self, weight: Tensor, residual: bool = False) -> None:
        """Fill a matrix, in place; `residual` says that it writes into the residual stream."""
        if weight.is_meta:
            return
        std = self._residual_std if residual else STD
        if type(weight) is nn.Parameter and weight.device.type == "cpu" and weight.dtype == torch.get_default_dtype():
            # The same numbers, without a second matrix.
            weight.normal_(std=std, generator=self._generator)
        else:
            weight.copy_(torch.empty(weight.shape).normal_(std=std, generator=self._generator))

    def fill_own(self, module: nn.Module, residual: Iterable[str] = ()) -> None:
        """Draw a module's own parameters, matrices or stacks of them; `residual` names what writes into the residual stream."""
        with self._whole(module):
            for name, parameter in module.named_parameters(recurse=False):
                self.draw(parameter, name in residual)

    @torch.no_grad()
    def fill(self, module: nn.Module, residual: Iterable[nn.Module] = ()) -> None:
        """Initialise a module and all that it is made of, in the order of `modules()`.

        Linear maps and embeddings are drawn, and what a `DrawnModule` has is drawn by itself; any other module with a
        ``reset_parameters`` of its own, such as a norm, knows its initial values.
        """
        writing = {id(x) for x in residual}
        for part in module.modules():
            with self._whole(part):
                if isinstance(part, DrawnModule):
                    if not any(parameter.is_meta for parameter in part.parameters(recurse=False)):
                        part.draw_parameters(self._generator)
                elif isinstance(part, nn.Linear | nn.Embedding):
                    self.draw(part.weight, id(part) in writing)
                else:
                    reset: Callable[[], None] | None = getattr(part, "reset_parameters", None)
                    if reset is not None:
                        reset()
