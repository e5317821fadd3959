"""A variant described by its recurrent form and its factors: what the decay and the delta engines have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from longspan.ops.decay.factors import Factors
from longspan.ops.tiling import Tiling
from longspan.ops.variants.variant import Gate, Gates, RecurrentForm, Variant
from longspan.state import Transition


class BuildFactors(Protocol):
    """Makes the factors of a call from its gates."""

    def __call__(
        self, gates: Gates, tiling: Tiling, num_heads: int, dtype: torch.dtype, state_dtype: torch.dtype
    ) -> Factors: ...


@dataclass(frozen=True, kw_only=True)
class FactorVariant(Variant):
    """A variant whose chunk form differs from others of its family in its factors alone."""

    name: str
    transition: type[Transition]
    gates: tuple[Gate, ...]
    recurrent_form: RecurrentForm
    factors: BuildFactors
    backends: tuple[str, ...] = ("torch",)

    def recurrent(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, scale: float, initial_state: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self.recurrent_form(q, k, v, gates, scale, initial_state)
