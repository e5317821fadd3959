"""The passes of a selective scan over all blocks and chunks. Nothing here is differentiated: `nodes` puts the passes together.

Shapes: as in `longspan.ops.selective_scan`; states ``[B, N, E]``. Pieces go by their numbers in the layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.layout import SequenceLayout
from longspan.ops.selective_scan.block import (
    SOFTPLUS_IS_THE_IDENTITY_ABOVE,
    BlockInputs,
    BlockScan,
    ChunkOfBlock,
    ScanInputs,
    over_channels,
)
from longspan.ops.selective_scan.plan import Chunk, blocks_of, chunks_of, chunks_of_piece
from longspan.ops.selective_scan.sums import SUMMED, DecayedSum, may_leave_out

States = Mapping[int, Tensor]
"""States ``[B, N, E]`` by the number of the piece that they enter or leave."""


@dataclass(frozen=True)
class ScanCall:
    """What the passes of one call share beside tensors."""

    layout: SequenceLayout
    chunk_size: int
    delta_softplus: bool
    state_dtype: torch.dtype

    def blocks(self, inputs: ScanInputs, backward: bool = False) -> Iterator[BlockScan]:
        """Every block of the call, one after another."""
        for block in blocks_of(inputs.u, inputs.B.shape[2], inputs.A.shape[1], self.chunk_size):
            yield BlockScan(inputs, block, self.chunk_size, self.state_dtype, self.delta_softplus, backward)

    def blocks_of_sums(self, inputs: ScanInputs) -> Iterator[BlockInputs]:
        """Every block of the call as sums over its tokens take it."""
        for block in blocks_of(inputs.u, inputs.B.shape[2], inputs.A.shape[1], SUMMED):
            yield BlockInputs(inputs, block, self.state_dtype, self.delta_softplus)


def _at_tokens(tokens: Mapping[int, int], states: States, scan: BlockScan) -> dict[int, Tensor | None]:
    """By token of a chunk, the block's part of the state of the piece that starts or ends there, if it has one."""
    return {token: scan.of_states(states[piece]) if piece in states else None for token, piece in tokens.items()}


def forward_pass(
    call: ScanCall, inputs: ScanInputs, entering: States, final_pieces: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs, the states before each chunk, and those after some pieces.

    entering: zero for pieces that it does not have. Returns o ``[B, T, E]`` in the dtype of u, states ``[num_chunks, B, N, E]``,
    of which nothing is written where a piece begins with a chunk, and states ``[len(final_pieces), B, N, E]``.
    """
    u, z = inputs.u, inputs.z
    chunks = chunks_of(call.layout, call.chunk_size)
    out = torch.empty_like(u, memory_format=torch.contiguous_format)
    shape = (u.shape[0], inputs.A.shape[1], u.shape[2])
    between = u.new_empty(len(chunks), *shape, dtype=call.state_dtype)
    final = between.new_empty(len(final_pieces), *shape)
    row_of = {piece: row for row, piece in enumerate(final_pieces)}
    for scan in call.blocks(inputs):
        before: Tensor | None = None
        for chunk in chunks:
            loaded = scan.load(chunk)
            scan.put_before(chunk, before)
            if not chunk.begins_with_a_piece:
                scan.of_states(between[chunk.number]).copy_(scan.states[0])
            y = loaded.read(scan.scan(chunk, loaded, _at_tokens(chunk.starts, entering, scan)))
            if scan.skip is not None:
                y.addcmul_(loaded.u, scan.skip)
            if z is not None:
                y.mul_(F.silu(scan.tokens(z, chunk).to(call.state_dtype)))
            scan.tokens(out, chunk).copy_(y)
            for token, piece in chunk.ends.items():
                if piece in row_of:
                    scan.of_states(final[row_of[piece]]).copy_(scan.state_after(token))
            before = scan.last_state(chunk)
    return out, between, final


def end_states(
    call: ScanCall, inputs: ScanInputs, entering: States, row_of: Mapping[int, int], num_rows: int
) -> tuple[Tensor, Tensor]:
    """The states that leave some pieces, and the sums of their steps: ``[num_rows, B, N, E]`` and ``[num_rows, B, E]``.

    row_of: where those of a piece go; other rows are zero. The sum of a channel may end where nothing is left of any state before:
    see `DecayedSum.distance`.
    """
    u = inputs.u
    ends = u.new_zeros(num_rows, u.shape[0], inputs.A.shape[1], u.shape[2], dtype=call.state_dtype)
    sums = ends.new_zeros(num_rows, u.shape[0], u.shape[2])
    leaves_out = bool(row_of) and may_leave_out(u, inputs.delta, inputs.delta_bias, inputs.B)
    for block in call.blocks_of_sums(inputs):
        for piece, row in row_of.items():
            passed = DecayedSum(block.rates, block.state_shape[0], leaves_out)
            for chunk in reversed(chunks_of_piece(call.layout, piece, SUMMED)):
                if passed.over:
                    break
                loaded = block.inputs_at(chunk, passed.channels)
                passed.add(loaded.steps, loaded.written, loaded.key, from_last=True)
            if piece in entering:
                passed.total += passed.decayed(block.of_states(entering[piece]))
            block.of_states(ends[row]).copy_(passed.total)
            block.of_states(sums[row].unsqueeze(1)).copy_(passed.distance.unsqueeze(1))
    return ends, sums


def entering_adjoint(
    call: ScanCall, inputs: ScanInputs, pieces: tuple[int, ...], grad_out: Tensor | None, leaving: States
) -> dict[int, Tensor]:
    """The gradients of the states that enter some pieces, from what this rank's tokens read of them; zero where nothing did.

    grad_out: of o ``[B, T, E]``, or None. leaving: gradients of the states that leave pieces.
    """
    u = inputs.u
    grads = {piece: u.new_zeros(u.shape[0], inputs.A.shape[1], u.shape[2], dtype=call.state_dtype) for piece in pieces}
    leaves_out = bool(grads) and may_leave_out(inputs.delta, inputs.delta_bias, inputs.C, inputs.z, grad_out)
    for block in call.blocks_of_sums(inputs):
        for piece, grad in grads.items():
            passed = DecayedSum(block.rates, block.state_shape[0], leaves_out)
            for chunk in chunks_of_piece(call.layout, piece, SUMMED):
                if passed.over:
                    break
                loaded = block.inputs_at(chunk, passed.channels)
                grad_y = _grad_of_y(call, block, chunk, loaded, inputs.z, grad_out, passed.channels)
                passed.add(loaded.steps, grad_y, loaded.query, from_last=False)
            if piece in leaving:
                passed.total += passed.decayed(block.of_states(leaving[piece]))
            block.of_states(grad).copy_(passed.total)
    return grads


def _grad_of_y(
    call: ScanCall,
    block: BlockInputs,
    chunk: Chunk,
    loaded: ChunkOfBlock,
    z: Tensor | None,
    grad_out: Tensor | None,
    channels: Tensor | None = None,
) -> Tensor:
    """The gradient of y, before the gate, ``[L, b, e]``; of all channels or of some."""
    if grad_out is None:
        return torch.zeros_like(loaded.u)
    grad = block.tokens(grad_out, chunk, channels).to(call.state_dtype)
    return grad if z is None else grad * F.silu(block.tokens(z, chunk, channels).to(call.state_dtype))


@dataclass
class ScanGradients:
    """The gradients of a call's tensors while they are gathered.

    Those of u, delta and z in the dtypes of the tensors, as every block writes its own; the others, which are sums over
    blocks or tokens, in the dtype of the states. entering: of the states that enter pieces.
    """

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    entering: dict[int, Tensor]

    @classmethod
    def like(cls, inputs: ScanInputs, dtype: torch.dtype, entering: States) -> ScanGradients:
        def own(x: Tensor) -> Tensor:
            return torch.empty_like(x, memory_format=torch.contiguous_format)

        def total(x: Tensor) -> Tensor:
            return torch.zeros(x.shape, dtype=dtype, device=x.device)

        return cls(
            own(inputs.u),
            own(inputs.delta),
            total(inputs.A),
            total(inputs.B),
            total(inputs.C),
            None if inputs.D is None else total(inputs.D),
            None if inputs.z is None else own(inputs.z),
            None if inputs.delta_bias is None else total(inputs.delta_bias),
            {piece: torch.empty_like(state, dtype=dtype) for piece, state in entering.items()},
        )

    def of(self, inputs: ScanInputs) -> tuple[Tensor | None, ...]:
        """Those of the call's tensors, in their order and dtypes."""
        found = (self.u, self.delta, self.A, self.B, self.C, self.D, self.z, self.delta_bias)
        return tuple(
            None if x is None or grad is None else grad.to(x.dtype) for x, grad in zip(inputs, found, strict=True)
        )


def backward_pass(
    call: ScanCall, inputs: ScanInputs, entering: States, between: Tensor, grad_out: Tensor | None, leaving: States
) -> ScanGradients:
    """All gradients, given those of o ``[B, T, E]`` (or None) and of the states that leave pieces.

    entering: the states that enter pieces, zero for others. between: of `forward_pass`.

    With λ_t = ∂L/∂h_t, and ε_t = λ_t e^{Δ_t A} h_{t-1}, which is the gradient of Δ_t A:

        λ_t = C_t ∂y_t + e^{Δ_{t+1} A} λ_{t+1}        ∂C_t = Σ_e h_t ∂y_t        ∂B_t = Σ_e λ_t Δ_t u_t
        ∂(Δ_t u_t) = Σ_n λ_t B_t                      ∂Δ_t = Σ_n ε_t A + u_t ∂(Δ_t u_t)        ∂A = Σ_t ε_t Δ_t
    """
    chunks = chunks_of(call.layout, call.chunk_size)
    grads = ScanGradients.like(inputs, call.state_dtype, entering)
    for scan in call.blocks(inputs, backward=True):
        grad_rates = torch.zeros_like(scan.rates)
        behind: Tensor | None = None
        for chunk in reversed(chunks):
            loaded = scan.load(chunk)
            scan.put_before(chunk, None if chunk.begins_with_a_piece else scan.of_states(between[chunk.number]))
            starts = _at_tokens(chunk.starts, entering, scan)
            states = scan.scan(chunk, loaded, starts)
            grad_y = _gated(call, scan, chunk, loaded, states, inputs, grad_out, grads)
            ends = _at_tokens(chunk.ends, leaving, scan)
            adjoints, behind, passed = scan.scan_adjoint(chunk, loaded, grad_y, behind, ends)
            for token, piece in chunk.starts.items():
                if piece in grads.entering:
                    scan.of_states(grads.entering[piece]).copy_(passed[token])
            scan.tokens_of_group(grads.C, chunk).add_(over_channels(states, grad_y))
            scan.tokens_of_group(grads.B, chunk).add_(over_channels(adjoints, loaded.written))
            grad_written = (loaded.key.unsqueeze(2) @ adjoints).squeeze(2)
            # From here on the decays' memory holds ε, and that of the states those before each token.
            products = scan.decays[: chunk.num_tokens]
            products.mul_(scan.put_states_before_tokens(chunk, starts)).mul_(adjoints)
            grad_steps = grad_written * loaded.u
            for products_of_number, rate in zip(products.unbind(2), scan.rates, strict=True):
                grad_steps.addcmul_(products_of_number, rate)
            grad_rates.add_(products.mul_(loaded.steps.unsqueeze(2)).sum((0, 1)))
            _put_token_gradients(call, scan, chunk, loaded, grad_y, grad_written, grad_steps, grads)
        scan.of_channels(grads.A).add_(grad_rates.t())
    return grads


def _gated(
    call: ScanCall,
    scan: BlockScan,
    chunk: Chunk,
    loaded: ChunkOfBlock,
    states: Tensor,
    inputs: ScanInputs,
    grad_out: Tensor | None,
    grads: ScanGradients,
) -> Tensor:
    """The gradient of y ``[L, b, e]``; that of z is put in its place."""
    grad_y = _grad_of_y(call, scan, chunk, loaded, inputs.z, grad_out)
    if inputs.z is None or grads.z is None:
        return grad_y
    if grad_out is None:
        scan.tokens(grads.z, chunk).zero_()
        return grad_y
    z = scan.tokens(inputs.z, chunk).to(call.state_dtype)
    y = loaded.read(states)
    if scan.skip is not None:
        y.addcmul_(loaded.u, scan.skip)
    gate = torch.sigmoid(z)
    # silu'(z) = σ (1 + z (1 − σ))
    slope = gate * (1 + z * (1 - gate))
    scan.tokens(grads.z, chunk).copy_(scan.tokens(grad_out, chunk).to(call.state_dtype) * y * slope)
    return grad_y


def _put_token_gradients(
    call: ScanCall,
    scan: BlockScan,
    chunk: Chunk,
    loaded: ChunkOfBlock,
    grad_y: Tensor,
    grad_written: Tensor,
    grad_steps: Tensor,
    grads: ScanGradients,
) -> None:
    """The gradients of u and delta of a chunk's tokens, and the tokens' shares of those of D and delta_bias."""
    grad_u = grad_written * loaded.steps
    if scan.skip is not None:
        assert grads.D is not None
        grad_u.addcmul_(grad_y, scan.skip)
        scan.of_channels(grads.D).add_((grad_y * loaded.u).sum((0, 1)))
    if call.delta_softplus:
        slope = torch.sigmoid(loaded.logits)
        grad_steps = grad_steps * slope.masked_fill_(loaded.logits > SOFTPLUS_IS_THE_IDENTITY_ABOVE, 1.0)
    scan.tokens(grads.u, chunk).copy_(grad_u)
    scan.tokens(grads.delta, chunk).copy_(grad_steps)
    if grads.delta_bias is not None:
        scan.of_channels(grads.delta_bias).add_(grad_steps.sum((0, 1)))
