"""The gradient of log decays, collected block by block.

g_t decays whatever passes from before token t to t or behind it. In its chunk that is

    Σ_{s < t ≤ i} of what i reads of s             pairs inside the chunk
    Σ_{i ≥ t} of what i reads from before          queries ⊙ their gradients
    Σ_{s < t} of what s adds to the chunk's end    keys ⊙ their gradients
    ⟨e^{b_C} S_in, ∂S_out⟩                         what passes through

The first is the sum of q_i ⊙ ∂q_i − k_i ⊙ ∂k_i over i ≥ t, if both leave out what a token reads of itself: g does not decay
that, and where decays are strong it is so much larger than all else that its rounding would be all that is left. The other three
hold nothing that cancels. No sum is longer than a chunk, so that its rounding does not grow with the sequence.

Shapes: as in `longspan.ops.matrices`; D is 1 for g ``[B, T, H]``, K for g ``[B, T, H, K]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.ops.decay.factors import LOWEST_LOG_DECAY
from longspan.ops.tiling import ChunkBlock, Tiling


class GateGradient:
    """Collects ∂g of one node of the graph: what a block adds, then `close` it; `finish` after all blocks."""

    def __init__(self, tiling: Tiling, g: Tensor, dtype: torch.dtype) -> None:
        """dtype: of the sums."""
        self._tiling, self._g, self._dtype = tiling, g, dtype
        self.per_channel = g.dim() == 4
        channels = g.shape[3] if self.per_channel else 1
        self._grad = torch.empty(*g.shape[:3], channels, dtype=dtype, device=g.device)
        self._of_tokens: Tensor | None = None
        self._of_earlier: Tensor | None = None
        self._of_ends: Tensor | None = None
        self._of_prefix: Tensor | None = None
        self._not_finite: Tensor | None = None

    def add(self, x: Tensor, grad: Tensor, sign: float = 1.0) -> None:
        """Add ``sign · x ⊙ ∂x`` of tokens, ``[n, B, H, c, K]``, to those at and before each; summed over K if D is 1."""
        product = self._product(x, grad)
        if self._of_tokens is None:
            self._of_tokens = product.to(self._dtype) if sign == 1.0 else product.to(self._dtype).mul_(sign)
        else:
            self._of_tokens.add_(product, alpha=sign)

    def _product(self, x: Tensor, grad: Tensor) -> Tensor:
        product = x * grad
        return product if self.per_channel else product.sum(-1, keepdim=True, dtype=self._dtype)

    def add_pairs(self, pairs: Tensor) -> None:
        """Add what i reads of s times its gradient, ``[n, B, H, c (i), c (s)]``, zero unless s < i; for D = 1."""
        sums = pairs.sum(-1, dtype=self._dtype).sub_(pairs.sum(-2, dtype=self._dtype)).unsqueeze(-1)
        self._of_tokens = sums if self._of_tokens is None else self._of_tokens.add_(sums)

    def add_earlier(self, x: Tensor, grad: Tensor) -> None:
        """Add ``x ⊙ ∂x`` of the block's tokens, ``[n, B, H, c, K]``, to those behind each; summed over K if D is 1."""
        self._of_earlier = self._product(x, grad).to(self._dtype)

    def add_sums(self, sums: Tensor) -> None:
        """Add sums of x ⊙ ∂x of the block's tokens that other nodes found, ``[n, B, H, c, D]``."""
        self._of_tokens = sums if self._of_tokens is None else self._of_tokens.add_(sums)

    def add_through(self, grad: Tensor, state: Tensor, total: Tensor | None) -> None:
        """Add ⟨∂S, total · S⟩ of what passes through chunks; ∂S, S ``[n, B, H, K, V]``, total ``[n, B or 1, H, D, 1]``, None is 1.

        Summed over V, and over K if D is 1.
        """
        products = self._over_states(grad, state)
        self._of_ends = products if total is None else products * total.squeeze(-1)

    def _over_states(self, grad: Tensor, state: Tensor) -> Tensor:
        """⟨∂S, S⟩ ``[..., D]`` of ``[..., K, ·]``."""
        # As a batch of vector products it reads each state once.
        size = grad.shape[-1] if self.per_channel else grad.shape[-1] * grad.shape[-2]
        products = torch.bmm(grad.reshape(-1, 1, size), state.reshape(-1, size, 1))
        return products.view(*grad.shape[:-2], -1)

    def mark(self, mask: Tensor) -> None:
        """Make ∂g of the block NaN where `mask` says ``[n, B, H, c, D]``."""
        self._not_finite = mask

    def add_prefix(self, chunks: slice | Tensor, grad: Tensor, incoming: Tensor) -> None:
        """Add what the decay from the piece's start to each of `chunks` gets.

        grad: ``[n, B, H, K, V]``, of what arrives at the chunks. incoming: ``[B, H, K, V]``.
        """
        if self._of_prefix is None:
            self._of_prefix = grad.new_zeros(self._tiling.num_chunks, *grad.shape[1:3], self._grad.shape[-1])
        self._of_prefix[chunks] += self._over_states(grad, incoming.expand_as(grad))

    def close(self, block: ChunkBlock) -> None:
        """Turn what was added for `block` into ∂g of its tokens."""
        if self._of_tokens is not None:
            grad = block.without_padding(self._of_tokens).flip(3).cumsum(3).flip(3)
        else:
            assert self._of_earlier is not None
            grad = torch.zeros_like(self._of_earlier)
        if self._of_earlier is not None:
            # The sum up to a token less the token itself would keep the rounding of the token.
            grad[:, :, :, 1:] += self._of_earlier[:, :, :, :-1].cumsum(3)
        if self._of_ends is not None:
            grad += self._of_ends.unsqueeze(3)
        if self._not_finite is not None:
            grad.masked_fill_(self._not_finite, torch.nan)
        block.put(self._grad, grad)
        self._not_finite = None
        self._of_tokens = self._of_earlier = self._of_ends = None

    def finish(self) -> Tensor:
        """∂g, in the shape and dtype of g."""
        if self._of_prefix is not None:
            for entry in self._tiling.pieces:
                if not entry.piece.starts_document:
                    self._add_prefix_of(entry.first_chunk, entry.last_chunk, entry.piece.start, entry.piece.stop)
        grad = self._grad if self.per_channel else self._grad.squeeze(-1)
        # Where the decay has been clamped it has no gradient.
        return grad.masked_fill_(self._g < LOWEST_LOG_DECAY, 0.0).to(self._g.dtype)

    def _add_prefix_of(self, first_chunk: int, last_chunk: int, start: int, stop: int) -> None:
        """The decay from a piece's start to a chunk holds g of all tokens in the chunks before it."""
        assert self._of_prefix is not None
        own = self._of_prefix[first_chunk:last_chunk]
        later = torch.zeros_like(own)
        later[:-1] = own[1:].flip(0).cumsum(0).flip(0)
        chunk_of_token = torch.arange(stop - start, device=own.device) // self._tiling.chunk_size
        self._grad[:, start:stop] += later[chunk_of_token].transpose(0, 1)
