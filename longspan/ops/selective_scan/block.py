"""One block of rows and channels of a selective scan: a chunk's inputs, working memory, and the scan forward and backward in time.

Shapes: L tokens of a chunk, b rows and e channels of the block, N numbers of a state. Working memory is ``[L, b, N, e]``, a token's
numbers side by side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.ops.selective_scan.plan import Block, Chunk

SOFTPLUS_IS_THE_IDENTITY_ABOVE = 20.0
"""As in `torch.nn.functional.softplus`, and in the kernels of state-spaces/mamba."""


class ScanInputs(NamedTuple):
    """The tensors of a call: u, delta, z ``[B, T, E]``; A ``[E, N]``; B, C ``[B, T, G, N]``; D, delta_bias ``[E]``."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None


def over_channels(states: Tensor, x: Tensor) -> Tensor:
    """Σ_e of states ``[L, b, N, e]`` times ``x [L, b, e]``, ``[L, b, N]``."""
    # A row times a matrix: a batch of matrices times columns takes several times as long on a CPU (docs/performance.md).
    return (x.unsqueeze(2) @ states.transpose(2, 3)).squeeze(2)


@dataclass(frozen=True)
class ChunkOfBlock:
    """What one chunk brings to one block, in the dtype of the states.

    logits: delta with its bias, and steps: Δ, both ``[L, b, e]``. u, written: u and Δ u ``[L, b, e]``. key, query: B and C
    ``[L, b, N]``.
    """

    logits: Tensor
    steps: Tensor
    u: Tensor
    written: Tensor
    key: Tensor
    query: Tensor

    def read(self, states: Tensor) -> Tensor:
        """h C of states ``[L, b, N, e]``, ``[L, b, e]``."""
        return (self.query.unsqueeze(2) @ states).squeeze(2)


class BlockInputs:
    """The inputs of a block, in the dtype of its states. state_shape: b, N, e."""

    def __init__(self, inputs: ScanInputs, block: Block, dtype: torch.dtype, softplus: bool) -> None:
        self._inputs, self._block, self._softplus, self._dtype = inputs, block, softplus, dtype
        channels = block.channels
        self.rates = inputs.A[channels].to(dtype).t().contiguous()
        self.bias = None if inputs.delta_bias is None else inputs.delta_bias[channels].to(dtype)
        self.skip = None if inputs.D is None else inputs.D[channels].to(dtype)
        num_rows, num_channels = block.shape
        self.state_shape = (num_rows, len(self.rates), num_channels)

    def tokens(self, x: Tensor, chunk: Chunk, channels: Tensor | None = None) -> Tensor:
        """The block's part of ``x [B, T, E]`` at a chunk's tokens, ``[L, b, e]``: a view, or some of its channels, copied."""
        part = x[self._block.rows, chunk.start : chunk.stop, self._block.channels].transpose(0, 1)
        return part if channels is None else part.index_select(2, channels)

    def tokens_of_group(self, x: Tensor, chunk: Chunk) -> Tensor:
        """The part of ``x [B, T, G, N]``, ``[L, b, N]``, a view."""
        return x[self._block.rows, chunk.start : chunk.stop, self._block.group].transpose(0, 1)

    def of_states(self, x: Tensor) -> Tensor:
        """The part of states ``[..., B, N, E]``, ``[..., b, N, e]``, a view."""
        return x[..., self._block.rows, :, self._block.channels]

    def of_channels(self, x: Tensor) -> Tensor:
        """The part of ``x [E, ...]``, a view."""
        return x[self._block.channels]

    def inputs_at(self, chunk: Chunk, channels: Tensor | None = None) -> ChunkOfBlock:
        """A chunk's inputs, of all of the block's channels or of some."""
        inputs, dtype = self._inputs, self._dtype
        logits = self.tokens(inputs.delta, chunk, channels).to(dtype)
        if self.bias is not None:
            logits = logits + (self.bias if channels is None else self.bias[channels])
        steps = F.softplus(logits, threshold=SOFTPLUS_IS_THE_IDENTITY_ABOVE) if self._softplus else logits
        u = self.tokens(inputs.u, chunk, channels).to(dtype)
        key, query = (self.tokens_of_group(x, chunk).to(dtype) for x in (inputs.B, inputs.C))
        return ChunkOfBlock(logits, steps, u, steps * u, key, query)


class BlockScan(BlockInputs):
    """The scan of a block, and its working memory, which every chunk uses again.

    `decays` holds e^{ΔA} of the chunk's tokens, and `states` their states behind the one before the chunk. `adjoints`: the
    gradients of the states, where they are wanted.
    """

    def __init__(
        self,
        inputs: ScanInputs,
        block: Block,
        chunk_size: int,
        dtype: torch.dtype,
        softplus: bool,
        backward: bool = False,
    ) -> None:
        super().__init__(inputs, block, dtype, softplus)
        self.decays = inputs.u.new_empty(chunk_size, *self.state_shape, dtype=dtype)
        self.states = self.decays.new_empty(chunk_size + 1, *self.state_shape)
        self.adjoints = torch.empty_like(self.decays) if backward else None
        self._decay_of, self._state_of = self.decays.unbind(0), self.states.unbind(0)
        self._adjoint_of = () if self.adjoints is None else self.adjoints.unbind(0)

    def load(self, chunk: Chunk) -> ChunkOfBlock:
        """A chunk's inputs; its decays and what its tokens write are put in working memory."""
        loaded = self.inputs_at(chunk)
        decays = self.decays[: chunk.num_tokens]
        torch.mul(loaded.steps.unsqueeze(2), self.rates, out=decays)
        decays.exp_()
        return loaded

    def scan(self, chunk: Chunk, loaded: ChunkOfBlock, entering: Mapping[int, Tensor | None]) -> Tensor:
        """The states after each token of the chunk, ``[L, b, N, e]``, from the one before it, which `states` has first.

        entering: for each token that starts a piece, the state that enters it ``[b, N, e]``, or None for zero.
        """
        states = self.states[1 : chunk.num_tokens + 1]
        torch.mul(loaded.written.unsqueeze(2), loaded.key.unsqueeze(3), out=states)
        state_of, decay_of = self._state_of, self._decay_of
        for token in range(chunk.num_tokens):
            before = entering[token] if token in entering else state_of[token]
            if before is not None:
                state_of[token + 1].addcmul_(decay_of[token], before)
        return states

    def put_before(self, chunk: Chunk, state: Tensor | None) -> None:
        """Set the state before a chunk; it is never read where a piece begins with the chunk."""
        if not chunk.begins_with_a_piece:
            assert state is not None
            self._state_of[0].copy_(state)

    def last_state(self, chunk: Chunk) -> Tensor:
        """The state after a chunk's last token, a view of working memory."""
        return self._state_of[chunk.num_tokens]

    def state_after(self, token: int) -> Tensor:
        """The state after a token of the chunk, a view of working memory."""
        return self._state_of[token + 1]

    def scan_adjoint(
        self,
        chunk: Chunk,
        loaded: ChunkOfBlock,
        grad_y: Tensor,
        behind: Tensor | None,
        leaving: Mapping[int, Tensor | None],
    ) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
        """The gradients of the states after each token, ``[L, b, N, e]``, from the last token to the first.

        grad_y: of y ``[L, b, e]``. behind: what later tokens of the last one's piece pass on to it, ``[b, N, e]`` or None.
        leaving: for each token that ends a piece, the gradient of the state that leaves it, or None.

        Returns the gradients, what the first token passes on, and for each token that starts a piece what it passes on.
        """
        assert self.adjoints is not None
        adjoint_of, decay_of = self._adjoint_of, self._decay_of
        adjoints = self.adjoints[: chunk.num_tokens]
        torch.mul(grad_y.unsqueeze(2), loaded.query.unsqueeze(3), out=adjoints)
        last = chunk.num_tokens - 1
        for token in range(last, -1, -1):
            adjoint = adjoint_of[token]
            if token in leaving or token == last:
                added = leaving.get(token, behind)
                if added is not None:
                    adjoint.add_(added)
            else:
                adjoint.addcmul_(decay_of[token + 1], adjoint_of[token + 1])
        passed = {token: decay_of[token] * adjoint_of[token] for token in chunk.starts}
        return adjoints, passed[0] if 0 in passed else decay_of[0] * adjoint_of[0], passed

    def put_states_before_tokens(self, chunk: Chunk, entering: Mapping[int, Tensor | None]) -> Tensor:
        """The states before each token ``[L, b, N, e]``; those of tokens that start a piece take the place of others' states."""
        for token, state in entering.items():
            if state is None:
                self._state_of[token].zero_()
            else:
                self._state_of[token].copy_(state)
        return self.states[: chunk.num_tokens]
