"""Chunkwise linear attention with decay: the engine behind every variant whose transition is diagonal.

    S_t = e^{g_t} S_{t-1} + k_t v_tᵀ,      o_t = scale · S_tᵀ q_t

Shapes: B batch rows, T tokens of this rank, H heads of v, H_k heads of q and k (H a multiple of H_k), K key size, V value size,
N chunks of at most C tokens. b_t is the sum of g from the chunk's first token to t, itself included. Inside a chunk

    o_t = scale · [ e^{b_t} S_inᵀ q_t + Σ_{s ≤ t} e^{b_t − b_s} (q_t·k_s) v_s ]
    S_out = e^{b_C} S_in + Σ_s e^{b_C − b_s} k_s v_sᵀ

(Lightning Attention-2, arXiv 2401.04658; GLA, arXiv 2312.06635, section 4). Scaling q by e^{b_t − m} and k by e^{m − b_s}, with m
in the middle of the chunk's range, lets plain matrix products do all of it; the states absorb e^m and e^{b_C − m}. Where the
range of b in a chunk is too wide for that, the products inside the chunk are formed first and multiplied by e^{b_t − b_s}, and
between chunks q takes e^{b_t} and k takes e^{b_C − b_s}: none of these exceeds 1, so nothing overflows at any decay.

Three phases, each linear in what it passes on, so that autograd composes them in any order:

    write          (k, v, g, start states) -> the state between any two chunks, each piece starting from zero or its start state
    read (inter)   (q, g, states, incoming states) -> what the tokens read from before their chunk
    read (intra)   (q, k, v, g) -> what they read inside their chunk

Only inputs and the states between chunks are kept for backward. The gradient of g needs no sum longer than a chunk:
∂g_t = Σ_{s ≥ t} (q_s·∂q_s − k_s·∂k_s) over the rest of the chunk, plus ⟨S_out, ∂S_out⟩ of the chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from longspan.layout import SequenceLayout
from longspan.ops.tiling import Block, Tiling, tile
from longspan.ops.variant import ChunkForm, Gate, Gates, RecurrentForm, Variant, Written, state_dtype
from longspan.state import Transition

# The widest half-range of b in a chunk for which e^{b − m} and e^{m − b} are formed apart. float32 and bfloat16 reach e^{±87}:
# at 40 a factor keeps 20 decades above the smallest normal number, and an unmasked product overflows at worst to an infinity
# above the diagonal, which the mask overwrites.
_MAX_HALF_RANGE = {torch.float64: 300.0, torch.float32: 40.0, torch.bfloat16: 40.0}

# e^{-1e4} is zero in every dtype: a log decay of −inf becomes this, so that no difference of two infinities arises.
_LOWEST_LOG_DECAY = -1e4


@dataclass(frozen=True)
class DecayFactors:
    """What a call needs of its decays, once for all phases. D is 1.

    query, key: e^{b − m} and e^{m − b} (or their one-sided forms), ``[B or 1, H, N, C, D]`` in the dtype of q; zero at padding.
    enter, leave, total: e^m, e^{b_C − m}, e^{b_C}, ``[B or 1, H, N, D]`` in the dtype of the states.
    prefix: decay from the start of the piece to the start of the chunk, the same shape; filled for pieces that continue a document.
    cumulative: b in float64, ``[B or 1, H, N, C]``. wide: for each chunk whether the range of b is too wide in any head.
    All tensors are None where nothing decays.
    """

    query: Tensor | None
    key: Tensor | None
    enter: Tensor | None
    leave: Tensor | None
    total: Tensor | None
    prefix: Tensor | None
    cumulative: Tensor | None
    wide: tuple[bool, ...] | None

    def is_wide(self, block: Block) -> bool:
        """Whether any chunk of the block needs its decays formed pair by pair."""
        if self.wide is None:
            return False
        if isinstance(block.chunks, slice):
            return any(self.wide[block.chunks])
        return any(self.wide[chunk] for chunk in block.chunks.tolist())


def no_decay_factors(tiling: Tiling, num_heads: int, dtype: torch.dtype) -> DecayFactors:
    """Factors of plain linear attention: nothing but the mask of the padding."""
    mask = None
    if tiling.valid is not None and any(block.valid is not None for block in tiling.blocks):
        mask = tiling.valid.to(dtype)[None, None, :, :, None].expand(-1, num_heads, -1, -1, -1)
    return DecayFactors(mask, mask, None, None, None, None, None, None)


def token_decay_factors(g: Tensor, tiling: Tiling, dtype: torch.dtype, state_dtype: torch.dtype) -> DecayFactors:
    """Factors of log decays a token, ``g [B, T, H]``."""
    spread = tiling.spread(g.detach()).permute(0, 3, 1, 2).to(torch.float64).clamp(min=_LOWEST_LOG_DECAY)
    if tiling.valid is not None:
        spread = spread * tiling.valid
    return _factors(spread.cumsum(-1), tiling, dtype, state_dtype)


def head_decay_factors(log_decay: Tensor, tiling: Tiling, dtype: torch.dtype, state_dtype: torch.dtype) -> DecayFactors:
    """Factors of a constant log decay a head, ``log_decay [H]``: one row of factors for each length of chunk."""
    decay = log_decay.detach().to(torch.float64).clamp(min=_LOWEST_LOG_DECAY)
    places = torch.arange(1, tiling.chunk_size + 1, device=decay.device, dtype=torch.float64)
    if tiling.valid is None:
        cumulative = (decay[:, None, None] * places)[None].expand(1, -1, tiling.num_chunks, -1)
    else:
        lengths = tiling.valid.sum(-1)
        cumulative = (decay[:, None, None] * torch.minimum(places, lengths[:, None]))[None]
    return _factors(cumulative, tiling, dtype, state_dtype)


def _factors(cumulative: Tensor, tiling: Tiling, dtype: torch.dtype, state_dtype: torch.dtype) -> DecayFactors:
    rows = cumulative
    repeated = tiling.valid is None and cumulative.stride(2) == 0
    if repeated:
        rows = cumulative[:, :, :1]
    first, last = rows[..., 0], rows[..., -1]
    middle = (first + last) / 2
    too_wide = (first - last) / 2 > _MAX_HALF_RANGE[dtype]
    query_reference = torch.where(too_wide, 0.0, middle)
    key_reference = torch.where(too_wide, last, middle)
    query = (rows - query_reference[..., None]).exp()
    key = (key_reference[..., None] - rows).exp()
    if tiling.valid is not None:
        query, key = query * tiling.valid, key * tiling.valid

    def every_chunk(x: Tensor) -> Tensor:
        return x.expand(-1, -1, tiling.num_chunks, *x.shape[3:]) if repeated else x

    def of_state(x: Tensor) -> Tensor:
        return every_chunk(x.exp().to(state_dtype).unsqueeze(-1))

    return DecayFactors(
        query=every_chunk(query.to(dtype).unsqueeze(-1)),
        key=every_chunk(key.to(dtype).unsqueeze(-1)),
        enter=of_state(query_reference),
        leave=of_state(last - key_reference),
        total=of_state(last),
        prefix=_prefix(every_chunk(last), tiling, state_dtype),
        cumulative=cumulative,
        wide=_wide_chunks(too_wide, tiling, repeated),
    )


def _prefix(totals: Tensor, tiling: Tiling, state_dtype: torch.dtype) -> Tensor:
    """Decay from the start of the piece to each chunk, ``[B or 1, H, N, 1]``, for the pieces that continue a document."""
    prefix = torch.zeros(totals.shape, dtype=state_dtype, device=totals.device)
    for entry in tiling.pieces:
        if not entry.piece.starts_document:
            chunks = totals[:, :, entry.first_chunk : entry.last_chunk]
            prefix[:, :, entry.first_chunk : entry.last_chunk] = (chunks.cumsum(-1) - chunks).exp().to(state_dtype)
    return prefix.unsqueeze(-1)


def _wide_chunks(too_wide: Tensor, tiling: Tiling, repeated: bool) -> tuple[bool, ...]:
    # Reading flags back is free on the CPU; elsewhere it would make the host wait, so every chunk takes the safe form.
    if too_wide.device.type != "cpu":
        return (True,) * tiling.num_chunks
    flags: list[bool] = too_wide.any(0).any(0).tolist()
    return tuple(flags * tiling.num_chunks if repeated else flags)


@dataclass(frozen=True)
class Call:
    """What the phases of one call share beside tensors."""

    tiling: Tiling
    factors: DecayFactors
    scale: float
    num_heads: int
    state_dtype: torch.dtype


def _scaled(x: Tensor, factor: Tensor | None, num_heads: int, scale: float = 1.0) -> Tensor:
    """``x [B, H_k, n, c, K]`` with its heads repeated to H and multiplied by `factor`: contiguous ``[B, H, n, c, K]``."""
    batch, num_key_heads, n, c, size = x.shape
    out = x.new_empty(batch, num_heads, n, c, size)
    if num_key_heads == num_heads:
        source, target = x, out
    else:
        source = x.unsqueeze(2)
        target = out.view(batch, num_key_heads, num_heads // num_key_heads, n, c, size)
        if factor is not None:
            factor = factor.unflatten(1, (num_key_heads, -1))
    if factor is not None:
        torch.mul(source, factor, out=target)
    elif scale != 1.0:
        torch.mul(source.expand_as(target), scale, out=target)
    else:
        target.copy_(source.expand_as(target))
    return out


def _put_scaled(target: Tensor, block: Block, values: Tensor, factor: Tensor | None, scale: float = 1.0) -> None:
    """Write ``values [B, H, n, c, K] · factor``, summed over the heads that share a head of `target [B, T, H_k, K]`."""
    num_key_heads, num_heads = target.shape[2], values.shape[1]
    if num_key_heads == num_heads and block.tokens is None:
        place = block.take(target)
        if factor is not None:
            torch.mul(values, factor, out=place)
        elif scale != 1.0:
            torch.mul(values, scale, out=place)
        else:
            place.copy_(values)
        return
    scaled = values * factor if factor is not None else values * scale
    if num_key_heads != num_heads:
        scaled = scaled.unflatten(1, (num_key_heads, -1)).sum(2)
    block.put(target, scaled)


class _BlockFactors:
    """The factors of one block of chunks, broadcastable against ``[B, H, n, c, K]`` and ``[B, H, n, K, V]``."""

    def __init__(self, call: Call, block: Block) -> None:
        factors = call.factors

        def of_tokens(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[:, :, block.chunks, : block.chunk_size]

        def of_states(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[:, :, block.chunks].unsqueeze(-1)

        self.key = of_tokens(factors.key)
        query = of_tokens(factors.query)
        self.query = query if query is None else query * call.scale
        self.enter = of_states(factors.enter)
        self.leave = of_states(factors.leave)
        self.prefix = of_states(factors.prefix)


def _pairwise_decay(call: Call, block: Block, dtype: torch.dtype) -> Tensor:
    """e^{b_t − b_s} for s ≤ t, else 0: ``[B or 1, H, n, c, c]``."""
    assert call.factors.cumulative is not None
    b = call.factors.cumulative[:, :, block.chunks, : block.chunk_size]
    decay = (b.unsqueeze(-1) - b.unsqueeze(-2)).clamp_(max=0.0).exp_().tril_()
    if block.valid is not None:
        decay = decay * (block.valid[:, :, None] & block.valid[:, None, :])
    return decay.to(dtype)


def _flat(x: Tensor) -> Tensor:
    """``[B, H, n, a, b]`` as a batch of matrices ``[B·H·n, a, b]``."""
    return x.reshape(-1, *x.shape[-2:])


def _states_of(call: Call, block: Block, factors: _BlockFactors, states: Tensor, incoming: Tensor | None) -> Tensor:
    """The states that enter the block's chunks, with what arrived from other ranks, times e^m: ``[B, H, n, K, V]``."""
    state = states[block.slots].permute(1, 2, 0, 3, 4)
    if incoming is not None:
        for chunks, segment in block.continuing:
            arrived = incoming[segment].unsqueeze(2)
            if factors.prefix is not None:
                arrived = arrived * factors.prefix[:, :, chunks]
            if isinstance(block.slots, slice) and chunks == slice(0, block.num_chunks):
                state = state + arrived
            else:
                state = state.clone()
                state[:, :, chunks] += arrived
    return state if factors.enter is None else state * factors.enter


def write_states(call: Call, k: Tensor, v: Tensor, start_states: Tensor | None) -> Tensor:
    """States between chunks, ``[num_slots, B, H, K, V]``: each piece starts from zero, or from its document's start state.

    start_states: ``[num_starting_pieces, B, H, K, V]``, for the pieces that start a document, in order.
    """
    tiling = call.tiling
    batch, _, _, key_size = k.shape
    states = torch.empty(
        tiling.num_slots, batch, call.num_heads, key_size, v.shape[-1], dtype=call.state_dtype, device=k.device
    )
    for block in tiling.blocks:
        factors = _BlockFactors(call, block)
        key = _scaled(block.take(k), factors.key, call.num_heads)
        value = _scaled(block.take(v), None, call.num_heads)
        written = torch.bmm(_flat(key).mT, _flat(value)).view(batch, call.num_heads, block.num_chunks, key_size, -1)
        _put_states(states, block.next_slots, written, factors.leave)
    _scan(call, states, start_states)
    return states


def _put_states(states: Tensor, slots: slice | Tensor, values: Tensor, factor: Tensor | None) -> None:
    """Write ``values [B, H, n, K, V] · factor`` to the slots of ``states [num_slots, B, H, K, V]``."""
    if isinstance(slots, slice) and factor is not None:
        # bfloat16 products are widened first: an operation on two dtypes at once is slow on the CPU.
        torch.mul(values.to(states.dtype), factor, out=states[slots].permute(1, 2, 0, 3, 4))
        return
    scaled = values if factor is None else values * factor
    states[slots] = scaled.permute(2, 0, 1, 3, 4).to(states.dtype)


def _scan(call: Call, states: Tensor, start_states: Tensor | None) -> None:
    """Turn what each chunk writes into running states, in place: ``S_{n+1} = e^{b_C} S_n + U_n``."""
    slots = states.unbind(0)
    totals = _totals(call)
    num_starts = 0
    for entry in call.tiling.pieces:
        if entry.piece.starts_document and start_states is not None:
            slots[entry.first_slot].copy_(start_states[num_starts])
            num_starts += 1
        else:
            slots[entry.first_slot].zero_()
        for chunk, slot in zip(
            range(entry.first_chunk, entry.last_chunk), range(entry.first_slot, entry.last_slot), strict=True
        ):
            if totals is None:
                slots[slot + 1].add_(slots[slot])
            else:
                slots[slot + 1].addcmul_(slots[slot], totals[chunk])


def _scan_adjoint(call: Call, grad_states: Tensor) -> None:
    """The scan's adjoint, in place: ``∂S_n += e^{b_C} ∂S_{n+1}``, from each piece's last slot to its first."""
    slots = grad_states.unbind(0)
    totals = _totals(call)
    for entry in call.tiling.pieces:
        for offset in range(entry.last_chunk - entry.first_chunk - 1, -1, -1):
            slot = entry.first_slot + offset
            if totals is None:
                slots[slot].add_(slots[slot + 1])
            else:
                slots[slot].addcmul_(slots[slot + 1], totals[entry.first_chunk + offset])


def _totals(call: Call) -> tuple[Tensor, ...] | None:
    total = call.factors.total
    return None if total is None else total.permute(2, 0, 1, 3).unsqueeze(-1).unbind(0)


class DecayWrite(torch.autograd.Function):
    """The write phase.

    | | shape | |
    |---|---|---|
    | k, v | [B, T, H_k, K], [B, T, H, V] | |
    | g | [B, T, H] or None | log decays; None where they take no gradient |
    | start_states | [num_starting_pieces, B, H, K, V] or None | |
    | states | [num_slots, B, H, K, V] | S between chunks, pieces starting from zero or their start state |
    | ends | [len(end_slots), B, H, K, V] | the states of `end_slots` once more, to be sent or returned |

    Forward: S_{n+1} = e^{b_C} S_n + Σ_s e^{b_C − b_s} k_s v_sᵀ. Backward: ∂S_n += e^{b_C} ∂S_{n+1};
    ∂k_s = e^{b_C − b_s} ∂S_{n+1} v_s; ∂v_s = e^{b_C − b_s} ∂S_{n+1}ᵀ k_s; ∂g by the module's formula.
    """

    @staticmethod
    def forward(
        ctx: Any,
        k: Tensor,
        v: Tensor,
        g: Tensor | None,
        start_states: Tensor | None,
        call: Call,
        end_slots: tuple[int, ...],
    ) -> tuple[Tensor, Tensor]:
        states = write_states(call, k, v, start_states)
        ctx.call, ctx.end_slots, ctx.has_start = call, end_slots, start_states is not None
        ctx.save_for_backward(k, v, g, states)
        ctx.set_materialize_grads(False)
        return states, states[list(end_slots)]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_states, grad_ends = grads
        call: Call = ctx.call
        k, v, g, states = ctx.saved_tensors
        # The read phase made this gradient for this node alone, so that the scan may run in place.
        total = torch.zeros_like(states) if grad_states is None else grad_states
        if grad_ends is not None:
            for row, slot in enumerate(ctx.end_slots):
                total[slot] += grad_ends[row]
        _scan_adjoint(call, total)
        dk, dv = torch.empty_like(k), torch.empty_like(v)
        gate = _GateGradient(call, k) if ctx.needs_input_grad[2] else None
        for block in call.tiling.blocks:
            factors = _BlockFactors(call, block)
            key = _scaled(block.take(k), factors.key, call.num_heads)
            value = _scaled(block.take(v), None, call.num_heads)
            grad_next = total[block.next_slots].permute(1, 2, 0, 3, 4)
            grad = _flat((grad_next if factors.leave is None else grad_next * factors.leave).to(k.dtype))
            grad_key = torch.bmm(_flat(value), grad.mT).view_as(key)
            _put_scaled(dk, block, grad_key, factors.key)
            _put_scaled(dv, block, torch.bmm(_flat(key), grad).view_as(value), None)
            if gate is not None:
                gate.subtract(block, key, grad_key)
                gate.add_chunks(block, total[block.next_slots], states[block.next_slots])
        grad_start = None
        if ctx.has_start:
            grad_start = total[[entry.first_slot for entry in call.tiling.pieces if entry.piece.starts_document]]
        return dk, dv, None if gate is None else gate.finish(g), grad_start, None, None


class _GateGradient:
    """Collects ∂b of each token and what each chunk adds to all its tokens, and turns them into ∂g."""

    def __init__(self, call: Call, like: Tensor) -> None:
        tiling = call.tiling
        self.call = call
        shape = (like.shape[0], call.num_heads, tiling.num_chunks)
        # Padding is never written and must be zero: it is summed.
        self.of_tokens = torch.zeros(*shape, tiling.chunk_size, dtype=call.state_dtype, device=like.device)
        self.of_chunks = torch.zeros(shape, dtype=call.state_dtype, device=like.device)

    def add(self, block: Block, x: Tensor, grad: Tensor, sign: float = 1.0) -> None:
        """Add ``sign · x·∂x`` of the block's tokens, ``[B, H, n, c, K]``."""
        product = (x * grad).sum(-1, dtype=self.call.state_dtype)
        self.of_tokens[:, :, block.chunks, : block.chunk_size] += product if sign > 0 else -product

    def subtract(self, block: Block, x: Tensor, grad: Tensor) -> None:
        """Subtract ``x·∂x``."""
        self.add(block, x, grad, sign=-1.0)

    def add_chunks(self, block: Block, grad: Tensor, state: Tensor) -> None:
        """Add ⟨∂S, S⟩ of the states that leave the block's chunks, ``[n, B, H, K, V]``."""
        # As a batch of vector products it reads each state once.
        products = torch.bmm(grad.reshape(-1, 1, grad[0, 0, 0].numel()), state.reshape(-1, grad[0, 0, 0].numel(), 1))
        self.of_chunks[:, :, block.chunks] += products.view(grad.shape[:3]).permute(1, 2, 0)

    def add_prefix(self, chunks: slice | Tensor, grad_log_prefix: Tensor) -> None:
        """Add the gradient of the decay from the start of the piece to each of `chunks`, ``[B, H, n]``."""
        if not hasattr(self, "of_prefix"):
            self.of_prefix = torch.zeros_like(self.of_chunks)
        self.of_prefix[:, :, chunks] += grad_log_prefix

    def finish(self, g: Tensor) -> Tensor:
        """∂g ``[B, T, H]`` in the dtype of `g`."""
        tiling = self.call.tiling
        of_chunks = self.of_chunks
        if hasattr(self, "of_prefix"):
            for entry in tiling.pieces:
                later = self.of_prefix[:, :, entry.first_chunk : entry.last_chunk]
                of_chunks[:, :, entry.first_chunk : entry.last_chunk] += later.flip(-1).cumsum(-1).flip(-1) - later
        of_tokens = self.of_tokens.flip(-1).cumsum(-1).flip(-1) + of_chunks.unsqueeze(-1)
        grad: Tensor = tiling.collect(of_tokens.permute(0, 2, 3, 1))
        return grad.to(g.dtype).masked_fill(g < _LOWEST_LOG_DECAY, 0.0)


class DecayRead(torch.autograd.Function):
    """The read phase: the part inside chunks, the part from the states before them, or both in one pass.

    | | shape | |
    |---|---|---|
    | q | [B, T, H_k, K] | |
    | k, v | [B, T, H_k, K], [B, T, H, V] | used by the part inside chunks |
    | g | [B, T, H] or None | log decays; None where they take no gradient |
    | states | [num_slots, B, H, K, V] or None | from the write phase; None leaves that part out |
    | incoming | [num_segments, B, H, K, V] or None | the state that enters each segment from other stretches |
    | base | [B, T, H, V] or None | the part inside chunks, if computed before: the other part is added to it in place |
    | o | [B, T, H, V] | |

    Forward: o_t = scale · (e^{b_t} S_inᵀ q_t + Σ_{s≤t} e^{b_t−b_s} (q_t·k_s) v_s), where S_in is the chunk's state plus the decayed
    incoming one. Backward: ∂S_in = scale · Σ_t e^{b_t} q_t ∂o_tᵀ, and the gradients of the sum, all in one pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        g: Tensor | None,
        states: Tensor | None,
        incoming: Tensor | None,
        base: Tensor | None,
        call: Call,
        value_size: int,
    ) -> Tensor:
        batch, num_tokens = q.shape[:2]
        o = base
        if o is None:
            o = q.new_empty(batch, num_tokens, call.num_heads, value_size)
        else:
            ctx.mark_dirty(base)
        for block in call.tiling.blocks:
            factors = _BlockFactors(call, block)
            query = _scaled(block.take(q), factors.query, call.num_heads, call.scale)
            out = None
            if k is not None and v is not None:
                value = _scaled(block.take(v), None, call.num_heads)
                scores, _, _ = _scores(call, block, factors, q, k, query)
                out = torch.bmm(scores, _flat(value))
            if states is not None:
                state = _flat(_states_of(call, block, factors, states, incoming).to(q.dtype))
                out = torch.bmm(_flat(query), state) if out is None else out.baddbmm_(_flat(query), state)
            assert out is not None
            out = out.view(batch, call.num_heads, block.num_chunks, block.chunk_size, value_size)
            block.put(o, out if base is None else out + block.take(o))
        ctx.call = call
        ctx.has_base = base is not None
        ctx.save_for_backward(q, k, v, g, states, incoming)
        return o

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (do,) = grads
        call: Call = ctx.call
        q, k, v, g, states, incoming = ctx.saved_tensors
        dq = torch.empty_like(q)
        dk = None if k is None else torch.empty_like(k)
        dv = None if v is None else torch.empty_like(v)
        gate = _GateGradient(call, q) if ctx.needs_input_grad[3] else None
        grad_states = None
        if states is not None:
            grad_states = torch.empty_like(states)
            grad_states[[entry.last_slot for entry in call.tiling.pieces]] = 0.0
        grad_incoming = None if incoming is None else torch.zeros_like(incoming)
        for block in call.tiling.blocks:
            factors = _BlockFactors(call, block)
            query = _scaled(block.take(q), factors.query, call.num_heads, call.scale)
            grad_out = _scaled(block.take(do), None, call.num_heads)
            grad_query: Tensor | None = None
            if states is not None and grad_states is not None:
                state = _flat(_states_of(call, block, factors, states, incoming).to(q.dtype))
                grad_query = torch.bmm(_flat(grad_out), state.mT)
                grad_state = torch.bmm(_flat(query).mT, _flat(grad_out)).view(
                    *query.shape[:3], q.shape[-1], do.shape[-1]
                )
                _put_states(grad_states, block.slots, grad_state, factors.enter)
                grad_state = grad_states[block.slots].permute(1, 2, 0, 3, 4)
                if incoming is not None and grad_incoming is not None:
                    _incoming_gradient(block, factors, grad_state, incoming, grad_incoming, gate)
            if k is not None and v is not None and dk is not None and dv is not None:
                grad_query = _backward_intra(
                    call, block, factors, (q, k, v), query, grad_out, grad_query, (dq, dk, dv), gate
                )
            else:
                assert grad_query is not None
                grad_query = grad_query.view_as(query)
                if gate is not None:
                    gate.add(block, query, grad_query)
            if grad_query is not None:
                _put_scaled(dq, block, grad_query, factors.query, call.scale)
        grad_base = do if ctx.has_base else None
        return dq, dk, dv, None if gate is None else gate.finish(g), grad_states, grad_incoming, grad_base, None, None


def _scores(
    call: Call, block: Block, factors: _BlockFactors, q: Tensor, k: Tensor, query: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """scale · e^{b_t − b_s} (q_t·k_s) for s ≤ t, ``[B·H·n, c, c]``; the keys it used, and the decays if they are formed apart."""
    if not call.factors.is_wide(block):
        key = _scaled(block.take(k), factors.key, call.num_heads)
        return torch.bmm(_flat(query), _flat(key).mT).tril_(), key, None
    key = _scaled(block.take(k), None, call.num_heads)
    plain_query = _scaled(block.take(q), None, call.num_heads, call.scale)
    decay = _pairwise_decay(call, block, q.dtype)
    scores = torch.bmm(_flat(plain_query), _flat(key).mT).view(*query.shape[:3], block.chunk_size, block.chunk_size)
    return _flat(scores * decay), key, decay


def _backward_intra(
    call: Call,
    block: Block,
    factors: _BlockFactors,
    inputs: tuple[Tensor, Tensor, Tensor],
    query: Tensor,
    grad_out: Tensor,
    grad_query: Tensor | None,
    grads: tuple[Tensor, Tensor, Tensor],
    gate: _GateGradient | None,
) -> Tensor | None:
    """Gradients of the part inside chunks; returns ∂(scaled q) that is still to be put, or None if ∂q has been put."""
    q, k, v = inputs
    dq, dk, dv = grads
    value = _scaled(block.take(v), None, call.num_heads)
    scores, key, decay = _scores(call, block, factors, q, k, query)
    grad_scores = torch.bmm(_flat(grad_out), _flat(value).mT)
    _put_scaled(dv, block, torch.bmm(scores.mT, _flat(grad_out)).view_as(value), None)
    if decay is None:
        grad_scores.tril_()
        grad_key = torch.bmm(grad_scores.mT, _flat(query)).view_as(key)
        _put_scaled(dk, block, grad_key, factors.key)
        if grad_query is None:
            grad_query = torch.bmm(grad_scores, _flat(key))
        else:
            grad_query.baddbmm_(grad_scores, _flat(key))
        grad_query = grad_query.view_as(query)
        if gate is not None:
            gate.add(block, query, grad_query)
            gate.subtract(block, key, grad_key)
        return grad_query
    grad_scores = _flat(grad_scores.view(*query.shape[:3], block.chunk_size, block.chunk_size) * decay)
    plain_query = _scaled(block.take(q), None, call.num_heads, call.scale)
    grad_key = torch.bmm(grad_scores.mT, _flat(plain_query)).view_as(key)
    _put_scaled(dk, block, grad_key, None)
    grad_plain = torch.bmm(grad_scores, _flat(key)).view_as(query)
    if gate is not None:
        gate.add(block, plain_query, grad_plain)
        gate.subtract(block, key, grad_key)
    if grad_query is not None:
        grad_query = grad_query.view_as(query)
        if gate is not None:
            gate.add(block, query, grad_query)
        # Bring the part from before the chunk to the same scale as the part inside it.
        grad_plain = grad_plain + (grad_query if factors.query is None else grad_query * (factors.query / call.scale))
    _put_scaled(dq, block, grad_plain, None, call.scale)
    return None


def _incoming_gradient(
    block: Block,
    factors: _BlockFactors,
    grad_state: Tensor,
    incoming: Tensor,
    grad_incoming: Tensor,
    gate: _GateGradient | None,
) -> None:
    """Add the block's share of ∂S_in of its segments, and of the decay between the segment's start and each chunk."""
    for chunks, segment in block.continuing:
        grad = grad_state[:, :, chunks]
        if factors.prefix is not None:
            grad = grad * factors.prefix[:, :, chunks]
        grad_incoming[segment] += grad.sum(2)
        if gate is not None:
            numbers = block.chunks if isinstance(block.chunks, slice) else block.chunks[chunks]
            gate.add_prefix(numbers, (grad * incoming[segment].unsqueeze(2)).sum((-1, -2)))


class BuildFactors(Protocol):
    """Makes the factors of a call from its gates; the only part of the chunk form in which decay variants differ."""

    def __call__(
        self, gates: Gates, tiling: Tiling, num_heads: int, dtype: torch.dtype, state_dtype: torch.dtype
    ) -> DecayFactors: ...


@dataclass(frozen=True)
class DecayVariant(Variant):
    """A variant with a diagonal transition, described by its recurrent form and its factors."""

    name: str
    transition: type[Transition]
    gates: tuple[Gate, ...]
    recurrent_form: RecurrentForm
    factors: BuildFactors

    def recurrent(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, scale: float, initial_state: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self.recurrent_form(q, k, v, gates, scale, initial_state)

    def prepare(self, k: Tensor, v: Tensor, gates: Gates, layout: SequenceLayout, chunk_size: int | None) -> ChunkForm:
        num_heads = v.shape[2]
        size = chunk_size or default_chunk_size(k.dtype)
        block_chunks = max(1, _BLOCK_NUMBERS // (k.shape[0] * num_heads * size * size))
        tiling = tile(layout, size, block_chunks, k.device)
        states = state_dtype(k.dtype)
        call = Call(tiling, self.factors(gates, tiling, num_heads, k.dtype, states), 1.0, num_heads, states)
        return DecayChunkForm(self.transition, call, gates)


_BLOCK_NUMBERS = 2**18
"""How many scores a block computes at a time: enough to fill a matrix product, few enough to stay in a core's cache."""


def default_chunk_size(dtype: torch.dtype) -> int:
    """Tokens in a chunk where the caller does not say."""
    return 128 if dtype == torch.bfloat16 else 64


@dataclass(frozen=True)
class DecayChunkForm(ChunkForm):
    """The chunk form of a diagonal transition."""

    transition_type: type[Transition]
    call: Call
    gates: Gates

    @property
    def _g(self) -> Tensor | None:
        return self.gates.get("g")

    def write(self, k: Tensor, v: Tensor, start_states: Tensor | None, end_pieces: Sequence[int]) -> Written:
        end_slots = tuple(self.call.tiling.pieces[index].last_slot for index in end_pieces)
        return Written(*DecayWrite.apply(k, v, self._g, start_states, self.call, end_slots))

    def _read(
        self,
        q: Tensor,
        inside: tuple[Tensor, Tensor] | None,
        written: Written | None,
        incoming: Tensor | None,
        scale: float,
        base: Tensor | None,
        value_size: int,
    ) -> Tensor:
        k, v = inside if inside is not None else (None, None)
        states = None if written is None else written.states
        call = replace(self.call, scale=scale)
        o: Tensor = DecayRead.apply(q, k, v, self._g, states, incoming, base, call, value_size)
        return o

    def read(self, q: Tensor, k: Tensor, v: Tensor, written: Written, incoming: Tensor | None, scale: float) -> Tensor:
        return self._read(q, (k, v), written, incoming, scale, None, v.shape[-1])

    def read_inside(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return self._read(q, (k, v), None, None, scale, None, v.shape[-1])

    def read_before(self, q: Tensor, written: Written, incoming: Tensor | None, scale: float, inside: Tensor) -> Tensor:
        return self._read(q, None, written, incoming, scale, inside, inside.shape[-1])

    def transition(self, ranges: Sequence[tuple[int, int]]) -> Transition:
        g = self._g
        if g is not None:
            sums = [g[:, start:stop].sum(1, dtype=self.call.state_dtype) for start, stop in ranges]
            return self.transition_type(torch.stack(sums))
        lengths = torch.tensor([float(stop - start) for start, stop in ranges], dtype=self.call.state_dtype)
        log_decay = self.gates.get("log_decay")
        if log_decay is None:
            return self.transition_type(lengths * 0.0)
        log_decay = log_decay.to(self.call.state_dtype).clamp(min=_LOWEST_LOG_DECAY)
        return self.transition_type(lengths.to(log_decay.device)[:, None] * log_decay)
