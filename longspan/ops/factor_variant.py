"""A variant described by its recurrent form and what decays: what the decay and the delta engines have in common."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from longspan.ops.gates import DecayKind, Gates
from longspan.ops.variants.variant import RecurrentForm, Variant


@dataclass(frozen=True, kw_only=True)
class FactorVariant(Variant):
    """A variant whose chunk form differs from others of its family in its decay alone."""

    name: str
    decay: DecayKind
    recurrent_form: RecurrentForm
    backends: tuple[str, ...] = ("torch",)

    def recurrent(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, scale: float, initial_state: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self.recurrent_form(q, k, v, gates, scale, initial_state)
