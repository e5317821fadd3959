"""The gradient of log decays, collected block by block.

In a chunk all depends on g through its running sum b: tokens through e^{b_t} (queries) and e^{−b_s} (keys), what leaves the
chunk through e^{b_C}. So ∂b_t = q_t ⊙ ∂q_t − k_t ⊙ ∂k_t, and ∂g_t is the sum of ∂b over the rest of the chunk, plus what its
end adds to all its tokens, ⟨S_out, ∂S_out⟩. No sum is longer than a chunk, so that its rounding does not grow with the sequence.

Shapes: as in `longspan.ops.decay`; n chunks of c tokens in a block; D is 1 for g ``[B, T, H]``, K for g ``[B, T, H, K]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.ops.factors import LOWEST_LOG_DECAY
from longspan.ops.tiling import Block, Tiling


class GateGradient:
    """Collects ∂g of one node of the graph: `add` and `add_end` for a block, then `close` it; `finish` after all blocks."""

    def __init__(self, tiling: Tiling, g: Tensor, num_heads: int, dtype: torch.dtype) -> None:
        """dtype: of the sums."""
        self._tiling, self._g, self._dtype = tiling, g, dtype
        self._per_channel = g.dim() == 4
        self._num_heads = num_heads
        channels = g.shape[3] if self._per_channel else 1
        self._grad = torch.empty(*g.shape[:3], channels, dtype=dtype, device=g.device)
        self._of_tokens: Tensor | None = None
        self._of_ends: Tensor | None = None
        self._of_prefix: Tensor | None = None

    def add(self, x: Tensor, grad: Tensor, sign: float = 1.0) -> None:
        """Add ``sign · x ⊙ ∂x`` of the block's tokens, ``[B, H, n, c, K]``, summed over K if D is 1."""
        product = x * grad
        if not self._per_channel:
            product = product.sum(-1, keepdim=True, dtype=self._dtype)
        if self._of_tokens is None:
            self._of_tokens = product.to(self._dtype) if sign == 1.0 else product.to(self._dtype).mul_(sign)
        else:
            self._of_tokens.add_(product, alpha=sign)

    def add_sums(self, sums: Tensor) -> None:
        """Add sums of x ⊙ ∂x of the block's tokens that other nodes found, ``[B, H, n, c, D]``."""
        self._of_tokens = sums if self._of_tokens is None else self._of_tokens.add_(sums)

    def add_end(self, grad: Tensor, state: Tensor) -> None:
        """Add ⟨∂S, S⟩ of what leaves the block's chunks, ``[B, H, n, K, ·]``, summed over the last dimension, over K if D is 1."""
        products = self._over_states(grad, state)
        self._of_ends = products if self._of_ends is None else self._of_ends + products

    def _over_states(self, grad: Tensor, state: Tensor) -> Tensor:
        """⟨∂S, S⟩ ``[..., D]`` of ``[..., K, ·]``."""
        # As a batch of vector products it reads each state once.
        size = grad.shape[-1] if self._per_channel else grad.shape[-1] * grad.shape[-2]
        products = torch.bmm(grad.reshape(-1, 1, size), state.reshape(-1, size, 1))
        return products.view(*grad.shape[:-2], -1)

    def add_prefix(self, chunks: slice | Tensor, grad: Tensor, incoming: Tensor) -> None:
        """Add what the decay from the piece's start to each of `chunks` gets.

        grad: ``[B, H, n, K, V]``, of what arrives at the chunks. incoming: ``[B, H, K, V]``.
        """
        if self._of_prefix is None:
            shape = (grad.shape[0], self._num_heads, self._tiling.num_chunks, self._grad.shape[-1])
            self._of_prefix = grad.new_zeros(shape)
        self._of_prefix[:, :, chunks] += self._over_states(grad, incoming.unsqueeze(2).expand_as(grad))

    def close(self, block: Block) -> None:
        """Turn what was added for `block` into ∂g of its tokens."""
        assert self._of_tokens is not None
        of_tokens = self._of_tokens
        if block.valid is not None:
            of_tokens = of_tokens * block.valid[..., None]
        grad = of_tokens.flip(3).cumsum(3).flip(3)
        if self._of_ends is not None:
            grad += self._of_ends.unsqueeze(3)
        block.put(self._grad, grad)
        self._of_tokens = self._of_ends = None

    def finish(self) -> Tensor:
        """∂g, in the shape and dtype of g."""
        if self._of_prefix is not None:
            for entry in self._tiling.pieces:
                if not entry.piece.starts_document:
                    self._add_prefix_of(entry.first_chunk, entry.last_chunk, entry.piece.start, entry.piece.stop)
        grad = self._grad if self._per_channel else self._grad.squeeze(-1)
        # Where the decay has been clamped it has no gradient.
        return grad.masked_fill_(self._g < LOWEST_LOG_DECAY, 0.0).to(self._g.dtype)

    def _add_prefix_of(self, first_chunk: int, last_chunk: int, start: int, stop: int) -> None:
        """The decay from a piece's start to a chunk holds g of all tokens in the chunks before it."""
        assert self._of_prefix is not None
        own = self._of_prefix[:, :, first_chunk:last_chunk]
        later = own.flip(2).cumsum(2).flip(2) - own
        chunk_of_token = torch.arange(stop - start, device=own.device) // self._tiling.chunk_size
        self._grad[:, start:stop] += later.permute(0, 2, 1, 3)[:, chunk_of_token]
