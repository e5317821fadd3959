"""What a block computes token by token, after its mixer.

Shapes: B batch rows, T tokens of this rank, C channels of the residual stream.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch.nn.functional as F
from torch import Tensor, nn

from longspan.models.initial import InitialWeights
from longspan.models.mixers.mixer import Context, operations_of_matrices


class FeedForward(nn.Module, ABC):
    """The interface between a block and its feed-forward layer."""

    @abstractmethod
    def forward(self, x: Tensor, context: Context) -> Tensor:
        """``[B, T, C]`` of x ``[B, T, C]``; `context` says which tokens these are."""

    @abstractmethod
    def init_weights(self, initial: InitialWeights) -> None:
        """Set the initial weights."""

    @abstractmethod
    def flops_per_token(self) -> float:
        """Floating-point operations of forward and backward for one token, six for each number of a matrix that it meets."""


class SwiGLU(FeedForward):
    """down(silu(gate(x)) ⊙ up(x)) (arXiv 2002.05202)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden_dim, bias=False)
        self.up_proj = nn.Linear(dim, hidden_dim, bias=False)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out

    def init_weights(self, initial: InitialWeights) -> None:
        initial.fill(self, residual=(self.down_proj,))

    def flops_per_token(self) -> float:
        return operations_of_matrices(self)
