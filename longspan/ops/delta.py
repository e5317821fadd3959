"""Chunkwise delta rule with decay: the engine behind DeltaNet, Gated DeltaNet and KDA.

    S_t = (I − β_t k_t k_tᵀ) Diag(e^{g_t}) S_{t-1} + β_t k_t v_tᵀ,      o_t = scale · S_tᵀ q_t

Shapes: B batch rows, T tokens of this rank, H heads of v, H_k heads of q and k (H a multiple of H_k), K key size, V value size,
N chunks of at most C tokens. b_t is the sum of g from the chunk's first token to t, itself included; g is absent, one number a
token and head, or one a key channel. With k̂_t = e^{b_t} k_t, k̃_s = e^{−b_s} k_s and q̂_t = scale · e^{b_t} q_t, the update that
token t writes is u_t = β_t (v_t − S_0ᵀ k̂_t − Σ_{s<t} (k̂_t·k̃_s) u_s), so that inside a chunk (DeltaNet, arXiv 2406.06484)

    L = tril(β k̂ k̃ᵀ, −1)        T = (I + L)⁻¹        Ũ = T (β v)        W = T (β k̂)        u = Ũ − W S_0
    o = P Ũ + (q̂ − P W) S_0     P = tril(q̂ k̃ᵀ)
    S_C = A S_0 + U              A = e^{b_C} (I − k̃ᵀ W)                U = e^{b_C} k̃ᵀ Ũ

(Gated DeltaNet, arXiv 2412.06464; KDA, arXiv 2510.26692). As in `longspan.ops.decay`, the factors e^{b} are taken about the middle
of the chunk's range. Everything is computed in the dtype of the states: float32, for bfloat16 inputs as well.

The phases are autograd nodes: solve (k, v, β, g → Ũ, W), summarize (k, Ũ, W, g → A and U of every chunk), fold (A, U → what
leaves a segment, to be sent), then, when the state that enters a segment has arrived, run (A, U → the state that enters every
chunk); read inside (q, k, Ũ, W, g → P Ũ and q̂ − P W) and read before. Ũ and W are laid out by chunks, ``[N, B, H, C, ·]``.

Fold and run share their backward: run only carries the gradient to the segment's start, so that it can be sent; fold adds the
gradient that comes back for the segment's end, and goes through the chunks once for both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from longspan.layout import SequenceLayout
from longspan.ops.factors import BlockFactors, Factors, WideScores
from longspan.ops.gate_gradient import GateGradient
from longspan.ops.tiling import Block, PieceSlots, Tiling, tile
from longspan.ops.variant import ChunkForm, Gate, Gates, RecurrentForm, Variant, state_dtype
from longspan.state import Dense, Transition


@dataclass(frozen=True)
class DeltaCall:
    """What the phases of one call share beside tensors."""

    tiling: Tiling
    factors: Factors
    num_heads: int
    dtype: torch.dtype
    """Of everything inside: the dtype of the states."""


def _by_chunks(x: Tensor | None) -> Tensor | None:
    """``[B, H, n, ...]`` as ``[n, B, H, ...]``."""
    return None if x is None else x.movedim(2, 0)


def _take(call: DeltaCall, block: Block, x: Tensor) -> Tensor:
    """The block's tokens of ``x [B, T, H or H_k, D]`` as ``[n, B, H, c, D]`` in the call's dtype, heads repeated."""
    taken = block.take(x).movedim(2, 0)
    if taken.shape[2] != call.num_heads:
        taken = taken.repeat_interleave(call.num_heads // taken.shape[2], dim=2)
    # Every use below is a matrix product, which would copy a permuted view each time.
    return taken.to(call.dtype).contiguous()


def _put(target: Tensor, block: Block, values: Tensor) -> None:
    """Write ``values [n, B, H, c, D]`` to the block's tokens of ``target [B, T, H or H_k, D]``, summed over shared heads."""
    values = values.movedim(0, 2)
    if target.shape[2] != values.shape[1]:
        values = values.unflatten(1, (target.shape[2], -1)).sum(2)
    block.put(target, values)


def _scaled(x: Tensor, factor: Tensor | None) -> Tensor:
    if factor is None:
        return x
    return torch.mul(x, factor, out=torch.empty_like(x, memory_format=torch.contiguous_format))


def _inverse(lower: Tensor) -> Tensor:
    """(I + L)⁻¹ for strictly lower L ``[..., C, C]``.

    Halves recurse; below 9 rows the Neumann product (I − L)(I + L²)(I + L⁴) is exact, and the powers stay so small that nothing
    cancels even where all keys are alike.
    """
    size = lower.shape[-1]
    if size <= 8:
        identity = torch.eye(size, dtype=lower.dtype, device=lower.device)
        inverse, power = identity - lower, lower @ lower
        for _ in range((size - 1).bit_length() - 1):
            inverse = inverse + inverse @ power
            power = power @ power
        return inverse
    half = size // 2
    first, last = lower[..., :half, :half], lower[..., half:, half:]
    inverse = torch.zeros_like(lower)
    if 2 * half == size:
        inverse_first, inverse_last = _inverse(torch.stack([first, last]))
    else:
        inverse_first, inverse_last = _inverse(first), _inverse(last)
    inverse[..., :half, :half], inverse[..., half:, half:] = inverse_first, inverse_last
    inverse[..., half:, :half] = -inverse_last @ (lower[..., half:, :half] @ inverse_first)
    return inverse


@dataclass(frozen=True)
class _Keys:
    """Of one block: factors, k, k̂ and k̃ ``[n, B, H, c, K]``."""

    factors: BlockFactors
    plain: Tensor
    ahead: Tensor
    behind: Tensor


def _keys(call: DeltaCall, block: Block, k: Tensor, g: Tensor | None) -> _Keys:
    factors = call.factors.block(block, g)
    plain = _take(call, block, k)
    ahead, behind = _scaled(plain, _by_chunks(factors.query)), _scaled(plain, _by_chunks(factors.key))
    return _Keys(factors, plain, ahead, behind)


def _scores(
    call: DeltaCall, block: Block, g: Tensor | None, rows: Tensor, columns: Tensor, ahead: Tensor, behind: Tensor
) -> tuple[Tensor, WideScores | None]:
    """Decayed products of rows (queries or keys) with keys, ``[n, B, H, c, c]``; what a wide block needs for its backward.

    rows, columns: without factors, for wide blocks; ahead, behind: with them.
    """
    if not call.factors.is_wide(block):
        return ahead @ behind.mT, None
    scores, wide = call.factors.wide_scores(block, g, rows.movedim(0, 2), columns.movedim(0, 2))
    return scores.movedim(2, 0), wide


def _scores_backward(grad: Tensor, wide: WideScores | None, ahead: Tensor, behind: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of (ahead, behind), or of (rows, columns) for a wide block."""
    if wide is None:
        return grad @ behind, grad.mT @ ahead
    grad_rows, grad_columns = wide.backward(grad.movedim(0, 2))
    return grad_rows.movedim(2, 0), grad_columns.movedim(2, 0)


class _GateGradient:
    """`GateGradient` for tensors laid out by chunks, ``[n, B, H, ...]``; does nothing where no gradient is wanted."""

    def __init__(self, call: DeltaCall, g: Tensor | None, wanted: bool) -> None:
        self._gradient: GateGradient | None = None
        if wanted and g is not None:
            self._gradient = GateGradient(call.tiling, g, call.num_heads, call.dtype)

    def add(self, x: Tensor, grad: Tensor, sign: float = 1.0) -> None:
        """Add ``sign · x ⊙ ∂x`` of the block's tokens, ``[n, B, H, c, K]``."""
        if self._gradient is not None:
            self._gradient.add(x.movedim(0, 2), grad.movedim(0, 2), sign)

    def add_end(self, grad: Tensor, x: Tensor) -> None:
        """Add ⟨∂x, x⟩ of what leaves the block's chunks, ``[n, B, H, K, ·]``."""
        if self._gradient is not None:
            self._gradient.add_end(grad.movedim(0, 2), x.movedim(0, 2))

    def close(self, block: Block) -> None:
        """Turn what was added for `block` into ∂g of its tokens."""
        if self._gradient is not None:
            self._gradient.close(block)

    def finish(self) -> Tensor | None:
        """∂g, in the shape and dtype of g, or None."""
        return None if self._gradient is None else self._gradient.finish()


def _masked(x: Tensor, block: Block) -> Tensor:
    """`x [n, B, H, c, D]` with zeros at padding."""
    return x if block.valid is None else x * block.valid[:, None, None, :, None]


class DeltaSolve(torch.autograd.Function):
    """Solve for what each token writes.

    | | shape | |
    |---|---|---|
    | k, v, beta | [B, T, H_k, K], [B, T, H, V], [B, T, H] | |
    | g | [B, T, H], [B, T, H, K] or None | |
    | updates Ũ | [N, B, H, C, V] | T (β v); zero at padding |
    | weights W | [N, B, H, C, K] | T (β k̂); zero at padding |

    Backward, with X = (Ũ, W), R = (β v, β k̂) and ∂R = Tᵀ ∂X: ∂L = −tril(∂R Xᵀ, −1), and the rest by the chain rule.
    """

    @staticmethod
    def forward(
        ctx: Any, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, call: DeltaCall
    ) -> tuple[Tensor, Tensor]:
        tiling = call.tiling
        shape = (tiling.num_chunks, k.shape[0], call.num_heads, tiling.chunk_size)
        allocate = torch.empty if tiling.valid is None else torch.zeros
        updates = allocate(*shape, v.shape[-1], dtype=call.dtype, device=k.device)
        weights = allocate(*shape, k.shape[-1], dtype=call.dtype, device=k.device)
        for block in tiling.blocks:
            keys, strength, _, _, inverse = _solve_block(call, block, k, beta, g)
            updates[block.chunks, :, :, : block.chunk_size] = inverse @ (strength * _take(call, block, v))
            weights[block.chunks, :, :, : block.chunk_size] = inverse @ (strength * keys.ahead)
        ctx.call = call
        ctx.save_for_backward(k, v, beta, g, updates, weights)
        return updates, weights

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_updates, grad_weights = grads
        call: DeltaCall = ctx.call
        k, v, beta, g, updates, weights = ctx.saved_tensors
        dk, dv, dbeta = torch.empty_like(k), torch.empty_like(v), torch.empty_like(beta)
        gate = _GateGradient(call, g, ctx.needs_input_grad[3])
        for block in call.tiling.blocks:
            rows = (block.chunks, slice(None), slice(None), slice(0, block.chunk_size))
            keys, strength, products, wide, inverse = _solve_block(call, block, k, beta, g)
            value = _take(call, block, v)
            grad_value, grad_ahead = inverse.mT @ grad_updates[rows], inverse.mT @ grad_weights[rows]
            grad_lower = -(grad_value @ updates[rows].mT + grad_ahead @ weights[rows].mT).tril(-1)
            grad_beta = (grad_value * value).sum(-1) + (grad_ahead * keys.ahead).sum(-1)
            grad_beta = grad_beta + (grad_lower * products).sum(-1)
            grad_ahead = strength * grad_ahead
            first, second = _scores_backward(strength * grad_lower, wide, keys.ahead, keys.behind)
            if wide is None:
                grad_ahead, grad_plain = grad_ahead + first, None
                grad_behind = second
                gate.add(keys.behind, grad_behind, -1.0)
                grad_key = _scaled(grad_behind, _by_chunks(keys.factors.key))
            else:
                gate.add(keys.plain, first)
                gate.add(keys.plain, second, -1.0)
                grad_plain = first + second
                grad_key = grad_plain
            gate.add(keys.ahead, grad_ahead)
            gate.close(block)
            grad_key = grad_key + _scaled(grad_ahead, _by_chunks(keys.factors.query))
            _put(dk, block, grad_key)
            _put(dv, block, strength * grad_value)
            _put(dbeta.unsqueeze(-1), block, grad_beta.unsqueeze(-1))
        return dk, dv, dbeta, gate.finish(), None


def _solve_block(
    call: DeltaCall, block: Block, k: Tensor, beta: Tensor, g: Tensor | None
) -> tuple[_Keys, Tensor, Tensor, WideScores | None, Tensor]:
    """Keys, β ``[n, B, H, c, 1]``, k̂ k̃ᵀ, its backward for a wide block, and T, of one block."""
    keys = _keys(call, block, k, g)
    strength = _masked(_take(call, block, beta.unsqueeze(-1)), block)
    products, wide = _scores(call, block, g, keys.plain, keys.plain, keys.ahead, keys.behind)
    # Above the diagonal, factors about the middle of a chunk may overflow; nothing there may be multiplied.
    products = products.tril(-1)
    return keys, strength, products, wide, _inverse(strength * products)


class DeltaSummarize(torch.autograd.Function):
    """What each chunk does to a state: S_out = A S_in + U.

    | | shape | |
    |---|---|---|
    | k, g, updates Ũ, weights W | as in DeltaSolve | |
    | transitions A | [N, B, H, K, K] | e^{b_C} (I − k̃ᵀ W) |
    | written U | [N, B, H, K, V] | e^{b_C} k̃ᵀ Ũ |

    Backward: ∂k̃ = Ũ (e^{b_C} ∂U)ᵀ − W (e^{b_C} ∂A)ᵀ; ∂Ũ = k̃ e^{b_C} ∂U; ∂W = −k̃ e^{b_C} ∂A; b_C gets ⟨A, ∂A⟩ + ⟨U, ∂U⟩.
    """

    @staticmethod
    def forward(
        ctx: Any, k: Tensor, updates: Tensor, weights: Tensor, g: Tensor | None, call: DeltaCall
    ) -> tuple[Tensor, Tensor]:
        num_chunks, batch, heads, _, key_size = weights.shape
        transitions = weights.new_empty(num_chunks, batch, heads, key_size, key_size)
        written = weights.new_empty(num_chunks, batch, heads, key_size, updates.shape[-1])
        for block in call.tiling.blocks:
            keys = _keys(call, block, k, g)
            rows = (block.chunks, slice(None), slice(None), slice(0, block.chunk_size))
            leave = _by_chunks(keys.factors.leave)
            enter = _by_chunks(keys.factors.enter)
            # W meets states scaled by e^m, so that its columns take that factor here.
            columns = weights[rows] if enter is None else weights[rows] * enter.mT
            transitions[block.chunks] = -_scaled(keys.behind.mT @ columns, leave)
            written[block.chunks] = _scaled(keys.behind.mT @ updates[rows], leave)
        diagonal = transitions.diagonal(dim1=-2, dim2=-1)
        totals = call.factors.totals
        if totals is None:
            diagonal.add_(1.0)
        else:
            diagonal.add_(torch.stack(totals).squeeze(-1))
        ctx.call = call
        ctx.save_for_backward(k, updates, weights, g, transitions, written)
        ctx.set_materialize_grads(False)
        return transitions, written

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_transitions, grad_written = grads
        call: DeltaCall = ctx.call
        k, updates, weights, g, transitions, written = ctx.saved_tensors
        if grad_transitions is None:
            grad_transitions = torch.zeros_like(transitions)
        if grad_written is None:
            grad_written = torch.zeros_like(written)
        dk = torch.empty_like(k)
        allocate = torch.empty_like if call.tiling.valid is None else torch.zeros_like
        grad_updates, grad_weights = allocate(updates), allocate(weights)
        gate = _GateGradient(call, g, ctx.needs_input_grad[3])
        for block in call.tiling.blocks:
            keys = _keys(call, block, k, g)
            rows = (block.chunks, slice(None), slice(None), slice(0, block.chunk_size))
            leave, enter = _by_chunks(keys.factors.leave), _by_chunks(keys.factors.enter)
            of_transitions, of_written = grad_transitions[block.chunks], grad_written[block.chunks]
            gate.add_end(of_transitions, transitions[block.chunks])
            gate.add_end(of_written, written[block.chunks])
            from_state = _scaled(of_transitions, leave)
            if enter is not None:
                from_state = from_state * enter.mT
            from_updates = _scaled(of_written, leave)
            grad_behind = updates[rows] @ from_updates.mT - weights[rows] @ from_state.mT
            grad_updates[rows] = keys.behind @ from_updates
            grad_weights[rows] = -keys.behind @ from_state
            gate.add(keys.behind, grad_behind, -1.0)
            gate.close(block)
            _put(dk, block, _scaled(grad_behind, _by_chunks(keys.factors.key)))
        return dk, grad_updates, grad_weights, gate.finish(), None


@dataclass
class _Link:
    """What the fold and run nodes of one call hand to each other.

    sent: numbers of the pieces whose end another rank receives. chains: for those that start a document, the states that fold
    computed, which are the true ones. states, grads: what run's backward leaves for fold's.
    """

    sent: frozenset[int]
    chains: dict[int, Tensor] = field(default_factory=dict)
    states: Tensor | None = None
    grads: Tensor | None = None


def _chain(transitions: Tensor, written: Tensor, states: Tensor) -> None:
    """Fill ``states [n + 1, B, H, K, V]`` from its first: S_{n+1} = A_n S_n + U_n."""
    rows = [x.flatten(1, 2).unbind(0) for x in (transitions, written, states)]
    for index in range(len(rows[0])):
        torch.baddbmm(rows[1][index], rows[0][index], rows[2][index], out=rows[2][index + 1])


class DeltaFold(torch.autograd.Function):
    """What leaves the pieces whose end another rank receives, each starting from zero or its document's start state.

    | | shape | |
    |---|---|---|
    | transitions A, written U | [N, B, H, K, K], [N, B, H, K, V] | from DeltaSummarize |
    | start_states | [num_starting_pieces, B, H, K, V] or None | |
    | ends | [len(end_pieces), B, H, K, V] | states; zero for pieces that nobody receives |
    | products | [len(end_pieces), B, H, K, K] | A of the whole piece, where it continues a document |

    The products take no gradient: ∂A below is formed with the true states, what arrived included, and holds it already.
    Backward: with λ the gradient of a piece's end, from elsewhere and from the piece's own reads, λ_n = ∂S_n + A_nᵀ λ_{n+1};
    ∂U_n = λ_{n+1}; ∂A_n = λ_{n+1} S_nᵀ.
    """

    @staticmethod
    def forward(
        ctx: Any,
        transitions: Tensor,
        written: Tensor,
        start_states: Tensor | None,
        call: DeltaCall,
        end_pieces: tuple[int, ...],
        link: _Link,
    ) -> tuple[Tensor, Tensor]:
        pieces = call.tiling.pieces
        starts = _start_rows(call)
        ends = written.new_zeros(len(end_pieces), *written.shape[1:])
        products = transitions.new_zeros(len(end_pieces), *transitions.shape[1:])
        for row, number in enumerate(end_pieces):
            if number not in link.sent:
                continue
            entry = pieces[number]
            chunks = slice(entry.first_chunk, entry.last_chunk)
            states = written.new_zeros(chunks.stop - chunks.start + 1, *written.shape[1:])
            if entry.piece.starts_document:
                if start_states is not None:
                    states[0] = start_states[starts[number]]
                link.chains[number] = states
            else:
                product = transitions[entry.first_chunk]
                for chunk in range(entry.first_chunk + 1, entry.last_chunk):
                    product = transitions[chunk] @ product
                products[row] = product
            _chain(transitions[chunks], written[chunks], states)
            ends[row] = states[-1]
        ctx.call, ctx.end_pieces, ctx.link, ctx.has_start = call, end_pieces, link, start_states is not None
        ctx.save_for_backward(transitions)
        ctx.mark_non_differentiable(products)
        ctx.set_materialize_grads(False)
        return ends, products

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        link: _Link = ctx.link
        if not link.sent:
            return None, None, None, None, None, None
        call: DeltaCall = ctx.call
        (transitions,) = ctx.saved_tensors
        if link.states is None or link.grads is None:
            raise RuntimeError("the output of every rank must enter the loss: this rank's has not been read")
        states, grad_states = link.states, link.grads
        link.states = link.grads = None
        grad_transitions = torch.zeros_like(transitions)
        grad_written = transitions.new_zeros(*transitions.shape[:-1], states.shape[-1])
        grad_starts = _zero_starts(call, states) if ctx.has_start else None
        starts = _start_rows(call)
        for row, number in enumerate(ctx.end_pieces):
            if number not in link.sent:
                continue
            entry = call.tiling.pieces[number]
            end = grad_states[entry.last_slot]
            if grads[0] is not None:
                end = end + grads[0][row]
            first = _chain_backward(entry, transitions, states, grad_states, end, grad_transitions, grad_written)
            if grad_starts is not None and entry.piece.starts_document:
                grad_starts[starts[number]] = first
        return grad_transitions, grad_written, grad_starts, None, None, None


def _start_rows(call: DeltaCall) -> dict[int, int]:
    """For each piece that starts a document, its row among them."""
    starting = [number for number, entry in enumerate(call.tiling.pieces) if entry.piece.starts_document]
    return {number: row for row, number in enumerate(starting)}


def _zero_starts(call: DeltaCall, states: Tensor) -> Tensor:
    return states.new_zeros(len(_start_rows(call)), *states.shape[1:])


def _chain_backward(
    entry: PieceSlots,
    transitions: Tensor,
    states: Tensor,
    grad_states: Tensor,
    end: Tensor,
    grad_transitions: Tensor,
    grad_written: Tensor,
) -> Tensor:
    """Go through a piece's chunks from its end; fill ∂A and ∂U of its chunks, return the gradient of the state it starts from."""
    grad = end
    for chunk in range(entry.last_chunk - 1, entry.first_chunk - 1, -1):
        slot = entry.first_slot + chunk - entry.first_chunk
        grad_written[chunk] = grad
        grad = _step_back(transitions[chunk], grad, grad_states[slot])
    chunks = slice(entry.first_chunk, entry.last_chunk)
    of_chunks = grad_written[chunks]
    torch.matmul(of_chunks, states[entry.first_slot : entry.last_slot].mT, out=grad_transitions[chunks])
    return grad


def _step_back(transition: Tensor, grad: Tensor, own: Tensor) -> Tensor:
    """∂S_n + A_nᵀ λ_{n+1}, each ``[B, H, ·, ·]``."""
    flat = torch.baddbmm(own.flatten(0, 1), transition.flatten(0, 1).mT, grad.flatten(0, 1))
    return flat.view_as(grad)


class DeltaRun(torch.autograd.Function):
    """The state that enters every chunk, once it is known what enters every segment.

    | | shape | |
    |---|---|---|
    | transitions A, written U | [N, B, H, K, K], [N, B, H, K, V] | from DeltaSummarize |
    | start_states | [num_starting_pieces, B, H, K, V] or None | |
    | incoming | [num_segments, B, H, K, V] or None | |
    | states | [num_slots, B, H, K, V] | |

    Forward: S_{n+1} = A_n S_n + U_n in every piece. Backward: as in DeltaFold, to which it leaves the pieces that fold sends.
    """

    @staticmethod
    def forward(
        ctx: Any,
        transitions: Tensor,
        written: Tensor,
        start_states: Tensor | None,
        incoming: Tensor | None,
        call: DeltaCall,
        link: _Link,
    ) -> Tensor:
        states = written.new_empty(call.tiling.num_slots, *written.shape[1:])
        starts = _start_rows(call)
        for number, entry in enumerate(call.tiling.pieces):
            own = states[entry.first_slot : entry.last_slot + 1]
            if number in link.chains:
                own.copy_(link.chains.pop(number))
                continue
            if not entry.piece.starts_document and incoming is not None:
                own[0] = incoming[entry.piece.segment]
            elif entry.piece.starts_document and start_states is not None:
                own[0] = start_states[starts[number]]
            else:
                own[0] = 0.0
            chunks = slice(entry.first_chunk, entry.last_chunk)
            _chain(transitions[chunks], written[chunks], own)
        ctx.call, ctx.link, ctx.has_start = call, link, start_states is not None
        ctx.has_incoming = incoming is not None
        ctx.num_segments = 0 if incoming is None else incoming.shape[0]
        ctx.save_for_backward(transitions, states)
        return states

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_states,) = grads
        call: DeltaCall = ctx.call
        link: _Link = ctx.link
        transitions, states = ctx.saved_tensors
        grad_incoming = states.new_zeros(ctx.num_segments, *states.shape[1:]) if ctx.has_incoming else None
        grad_starts = _zero_starts(call, states) if ctx.has_start else None
        starts = _start_rows(call)
        grad_transitions = grad_written = None
        if len(link.sent) < len(call.tiling.pieces):
            grad_transitions = torch.zeros_like(transitions)
            grad_written = transitions.new_zeros(*transitions.shape[:-1], states.shape[-1])
        if link.sent:
            link.states, link.grads = states, grad_states
        for number, entry in enumerate(call.tiling.pieces):
            starting = entry.piece.starts_document
            end = grad_states[entry.last_slot]
            if number in link.sent:
                if not starting and grad_incoming is not None:
                    grad_incoming[entry.piece.segment] += _carried_back(entry, transitions, grad_states, end)
                continue
            assert grad_transitions is not None and grad_written is not None
            first = _chain_backward(entry, transitions, states, grad_states, end, grad_transitions, grad_written)
            if starting and grad_starts is not None:
                grad_starts[starts[number]] = first
            elif not starting and grad_incoming is not None:
                grad_incoming[entry.piece.segment] += first
        return grad_transitions, grad_written, grad_starts, grad_incoming, None, None


def _carried_back(entry: PieceSlots, transitions: Tensor, grad_states: Tensor, end: Tensor) -> Tensor:
    """The gradient of the state that a piece starts from, and nothing else."""
    grad = end
    for chunk in range(entry.last_chunk - 1, entry.first_chunk - 1, -1):
        slot = entry.first_slot + chunk - entry.first_chunk
        grad = _step_back(transitions[chunk], grad, grad_states[slot])
    return grad


class DeltaInside(torch.autograd.Function):
    """What tokens read inside their chunk, and what they will read the state before it with.

    | | shape | |
    |---|---|---|
    | q, k, g, updates Ũ, weights W | as in DeltaSolve; q [B, T, H_k, K] | |
    | inside P Ũ | [N, B, H, C, V] | |
    | queries q̂ − P W | [N, B, H, C, K] | zero at padding |

    Backward: ∂P = tril(∂inside Ũᵀ − ∂queries Wᵀ); ∂q̂ = ∂queries + ∂P k̃; ∂k̃ = ∂Pᵀ q̂; ∂Ũ = Pᵀ ∂inside; ∂W = −Pᵀ ∂queries.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        updates: Tensor,
        weights: Tensor,
        g: Tensor | None,
        call: DeltaCall,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        allocate = torch.empty_like if call.tiling.valid is None else torch.zeros_like
        inside, queries = allocate(updates), allocate(weights)
        for block in call.tiling.blocks:
            rows = (block.chunks, slice(None), slice(None), slice(0, block.chunk_size))
            _, _, query, scores, _ = _read_block(call, block, q, k, g, scale)
            inside[rows] = scores @ updates[rows]
            queries[rows] = query - scores @ weights[rows]
        ctx.call, ctx.scale = call, scale
        ctx.save_for_backward(q, k, updates, weights, g)
        return inside, queries

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_inside, grad_queries = grads
        call: DeltaCall = ctx.call
        q, k, updates, weights, g = ctx.saved_tensors
        dq, dk = torch.empty_like(q), torch.empty_like(k)
        allocate = torch.empty_like if call.tiling.valid is None else torch.zeros_like
        grad_updates, grad_weights = allocate(updates), allocate(weights)
        gate = _GateGradient(call, g, ctx.needs_input_grad[4])
        for block in call.tiling.blocks:
            rows = (block.chunks, slice(None), slice(None), slice(0, block.chunk_size))
            keys, plain_query, query, scores, wide = _read_block(call, block, q, k, g, ctx.scale)
            of_inside, of_queries = grad_inside[rows], grad_queries[rows]
            grad_updates[rows] = scores.mT @ of_inside
            grad_weights[rows] = -(scores.mT @ of_queries)
            grad_scores = (of_inside @ updates[rows].mT - of_queries @ weights[rows].mT).tril()
            first, second = _scores_backward(grad_scores, wide, query, keys.behind)
            if wide is None:
                grad_query = of_queries + first
                gate.add(query, grad_query)
                gate.add(keys.behind, second, -1.0)
                grad_query = _scaled(grad_query, _by_chunks(keys.factors.query))
                grad_key = _scaled(second, _by_chunks(keys.factors.key))
            else:
                gate.add(query, of_queries)
                gate.add(plain_query, first)
                gate.add(keys.plain, second, -1.0)
                grad_query = first + _scaled(of_queries, _by_chunks(keys.factors.query))
                grad_key = second
            gate.close(block)
            _put(dq, block, ctx.scale * grad_query)
            _put(dk, block, grad_key)
        return dq, dk, grad_updates, grad_weights, gate.finish(), None, None


def _read_block(
    call: DeltaCall, block: Block, q: Tensor, k: Tensor, g: Tensor | None, scale: float
) -> tuple[_Keys, Tensor, Tensor, Tensor, WideScores | None]:
    """Keys, scaled q, q̂, P, and P's backward for a wide block, of one block."""
    keys = _keys(call, block, k, g)
    plain_query = _take(call, block, q) * scale
    query = _scaled(plain_query, _by_chunks(keys.factors.query))
    scores, wide = _scores(call, block, g, plain_query, keys.plain, query, keys.behind)
    return keys, plain_query, query, scores.tril(), wide


class DeltaBefore(torch.autograd.Function):
    """The output: what tokens read inside their chunk, and of the state before it.

    | | shape | |
    |---|---|---|
    | inside, queries | [N, B, H, C, V], [N, B, H, C, K] | from DeltaInside |
    | states | [num_slots, B, H, K, V] | from DeltaRun |
    | o | [B, T, H, V] | inside + queries e^m S |

    Backward: ∂inside = ∂o; ∂queries = ∂o (e^m S)ᵀ; ∂S = e^m queriesᵀ ∂o.
    """

    @staticmethod
    def forward(
        ctx: Any,
        inside: Tensor,
        queries: Tensor,
        states: Tensor,
        call: DeltaCall,
        dtype: torch.dtype,
    ) -> Tensor:
        o = inside.new_empty(inside.shape[1], call.tiling.num_tokens, call.num_heads, inside.shape[-1], dtype=dtype)
        for block in call.tiling.blocks:
            rows = (block.chunks, slice(None), slice(None), slice(0, block.chunk_size))
            state = _scaled(states[block.slots], _by_chunks(call.factors.enter(block)))
            _put(o, block, inside[rows] + queries[rows] @ state)
        ctx.call, ctx.like = call, (inside.shape, queries.shape)
        ctx.save_for_backward(queries, states)
        return o

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (do,) = grads
        call: DeltaCall = ctx.call
        queries, states = ctx.saved_tensors
        shape_inside, shape_queries = ctx.like
        allocate = torch.empty if call.tiling.valid is None else torch.zeros
        grad_inside = allocate(shape_inside, dtype=call.dtype, device=do.device)
        grad_queries = allocate(shape_queries, dtype=call.dtype, device=do.device)
        grad_states = torch.empty_like(states)
        grad_states[[entry.last_slot for entry in call.tiling.pieces]] = 0.0
        for block in call.tiling.blocks:
            rows = (block.chunks, slice(None), slice(None), slice(0, block.chunk_size))
            enter = _by_chunks(call.factors.enter(block))
            grad_out = _masked(_take(call, block, do), block)
            grad_inside[rows] = grad_out
            grad_queries[rows] = grad_out @ _scaled(states[block.slots], enter).mT
            grad_states[block.slots] = _scaled(queries[rows].mT @ grad_out, enter)
        return grad_inside, grad_queries, grad_states, None, None


class BuildFactors(Protocol):
    """Makes the factors of a call from its gates; the only part of the chunk form in which delta variants differ."""

    def __call__(
        self, gates: Gates, tiling: Tiling, num_heads: int, dtype: torch.dtype, state_dtype: torch.dtype
    ) -> Factors: ...


@dataclass(frozen=True)
class DeltaVariant(Variant):
    """A variant of the delta rule, described by its recurrent form and its factors; one gate is beta, another may be g."""

    name: str
    gates: tuple[Gate, ...]
    recurrent_form: RecurrentForm
    factors: BuildFactors
    transition: type[Transition] = Dense

    def recurrent(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, scale: float, initial_state: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self.recurrent_form(q, k, v, gates, scale, initial_state)

    def prepare(self, k: Tensor, v: Tensor, gates: Gates, layout: SequenceLayout, chunk_size: int | None) -> ChunkForm:
        num_heads, size = v.shape[2], chunk_size or DEFAULT_CHUNK_SIZE
        block_chunks = max(1, BLOCK_NUMBERS // (k.shape[0] * num_heads * size * size))
        tiling = tile(layout, size, block_chunks, k.device)
        dtype = state_dtype(k.dtype)
        factors = self.factors(gates, tiling, num_heads, dtype, dtype)
        return DeltaChunkForm(DeltaCall(tiling, factors, num_heads, dtype), gates)


DEFAULT_CHUNK_SIZE = 64
BLOCK_NUMBERS = 2**18
"""How many scores a block computes at a time."""


@dataclass
class DeltaChunkForm(ChunkForm):
    """The chunk form of the delta rule."""

    call: DeltaCall
    gates: Gates
    _k: Tensor | None = None
    _solved: tuple[Tensor, Tensor] | None = None
    _summary: tuple[Tensor, Tensor] | None = None
    _start_states: Tensor | None = None
    _link: _Link = field(default_factory=lambda: _Link(frozenset()))
    _products: dict[int, Tensor] = field(default_factory=dict)
    _states: Tensor | None = None

    @property
    def _g(self) -> Tensor | None:
        return self.gates.get("g")

    def write(
        self, k: Tensor, v: Tensor, start_states: Tensor | None, end_pieces: Sequence[int], sent_pieces: Sequence[int]
    ) -> Tensor:
        updates, weights = DeltaSolve.apply(k, v, self.gates["beta"], self._g, self.call)
        transitions, written = DeltaSummarize.apply(k, updates, weights, self._g, self.call)
        self._k = k
        self._solved, self._summary, self._start_states = (updates, weights), (transitions, written), start_states
        self._link = _Link(frozenset(sent_pieces))
        ends, products = DeltaFold.apply(transitions, written, start_states, self.call, tuple(end_pieces), self._link)
        self._products = dict(zip(end_pieces, products.unbind(0), strict=True))
        result: Tensor = ends
        return result

    def states(self, incoming: Tensor | None) -> Tensor:
        """The state that enters every chunk and leaves every piece, ``[num_slots, B, H, K, V]``."""
        if self._states is None:
            assert self._summary is not None
            self._states = DeltaRun.apply(*self._summary, self._start_states, incoming, self.call, self._link)
        return self._states

    def read(self, q: Tensor, wait: Callable[[], Tensor | None], scale: float, overlapped: bool) -> Tensor:
        # What is read inside chunks is a node of its own in any case, so it always goes before the wait.
        assert self._solved is not None and self._k is not None
        inside, queries = DeltaInside.apply(q, self._k, *self._solved, self._g, self.call, scale)
        o: Tensor = DeltaBefore.apply(inside, queries, self.states(wait()), self.call, q.dtype)
        return o

    def final_states(self, pieces: Sequence[int], rows: Sequence[int], incoming: Tensor | None) -> Tensor:
        return self.states(incoming)[[self.call.tiling.pieces[number].last_slot for number in pieces]]

    def transition(self, ranges: Sequence[tuple[int, int]]) -> Transition:
        assert self._summary is not None
        like = self._summary[0]
        products = []
        for start, stop in ranges:
            # A range of several pieces starts a document, and a range of none changes nothing.
            product = torch.eye(like.shape[-1], dtype=like.dtype, device=like.device).expand(like.shape[1:])
            for number, entry in enumerate(self.call.tiling.pieces):
                if (entry.piece.start, entry.piece.stop) == (start, stop) and number in self._products:
                    product = self._products[number]
            products.append(product)
        return Dense(torch.stack(products))
