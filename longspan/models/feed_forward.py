"""What a block computes token by token, after its mixer.

Shapes: B batch rows, T tokens of this rank, C channels of the residual stream.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch.nn.functional as F
from torch import Tensor, nn

from longspan.errors import InputError
from longspan.models.initial import InitialWeights
from longspan.models.mixers.mixer import Context, operations_of_matrices
from longspan.models.routing import Routed
from longspan.ops.chunked.swiglu import chunked_swiglu


class FeedForward(nn.Module, ABC):
    """The interface between a block and its feed-forward layer."""

    @abstractmethod
    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Routed | None]:
        """``[B, T, C]`` of x ``[B, T, C]``, and what its router decided, if it has one; `context` says which tokens these are."""

    @abstractmethod
    def init_weights(self, initial: InitialWeights) -> None:
        """Set the initial weights."""

    @abstractmethod
    def flops_per_token(self) -> float:
        """Floating-point operations of forward and backward for one token, six for each number of a matrix that it meets."""

    def num_idle_parameters(self) -> int:
        """Number of trained numbers that a token does not meet, those of experts that it does not choose."""
        return 0


class SwiGLU(FeedForward):
    """down(silu(gate(x)) ⊙ up(x)) (arXiv 2002.05202).

    chunk_size: of so many tokens at a time, computed once more in backward, so that nothing of width `hidden_dim` is kept
    (arXiv 2407.15892); 0 computes all tokens at once.
    """

    def __init__(self, dim: int, hidden_dim: int, chunk_size: int = 0) -> None:
        super().__init__()
        self.chunk_size = chunk_size
        self.gate_proj = nn.Linear(dim, hidden_dim, bias=False)
        self.up_proj = nn.Linear(dim, hidden_dim, bias=False)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, None]:
        if self.chunk_size:
            return chunked_swiglu(x, *self._matrices(), self.chunk_size), None
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)), None

    def _matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        projections = (self.gate_proj, self.up_proj, self.down_proj)
        for projection in projections:
            if not isinstance(projection, nn.Linear):
                raise InputError(
                    f"a feed-forward layer in chunks takes the matrices of torch.nn.Linear; got {type(projection).__name__}. Set "
                    "feed_forward_chunk to 0"
                )
        gate, up, down = (projection.weight for projection in projections)
        return gate, up, down

    def init_weights(self, initial: InitialWeights) -> None:
        initial.fill(self, residual=(self.down_proj,))

    def flops_per_token(self) -> float:
        return operations_of_matrices(self)
