"""A causal convolution with a sum of exponentials, as the linear recurrence that it is, in chunks.

    h_j = Re Σ_n c_n e^{j a_n},      S_t = e^a ⊙ S_{t-1} + x_t,      y_t = Re Σ_n c_n S_t,n = Σ_j h_j x_{t-j}

per channel: a state of N numbers, real, or complex where a and c are (S4D, arXiv 2206.11893; the modal form of Laughing Hyena,
arXiv 2310.18780). Inside a chunk of L tokens y is a product with the L × L matrix h_{t-s}; what a chunk writes into the state is
a product with L × N powers, and what its tokens read of the state before it another one. Nothing of the size T · N is ever there:
the states between chunks are T · N / L numbers of a channel.

Powers e^{j a} are made in float64: a in float32 is what it is, but j · a would lose its digits.

Shapes: B batch rows, T tokens, C channels, N exponentials of a channel; L tokens of a chunk, n chunks; q numbers of a state's
entry, 1 if real and 2 if complex.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.dtypes import accumulation_dtype
from longspan.first_order import first_order
from longspan.layout import SequenceLayout
from longspan.layout.rows import index_of
from longspan.ops.long_convolution.by_channels import by_channels

MOST_TOKENS = 64
"""L: the L × L products are then about what those with the states of 16 to 32 exponentials are."""
# Numbers of the tokens that are computed together.
_NUMBERS = 1 << 20


@dataclass(frozen=True)
class _Indices:
    """The rows of the slots of some chunks, ``[chunks · L]``, 0 where there is none; and those slots."""

    rows: Tensor
    gaps: Tensor


@dataclass(frozen=True)
class ChunkPlan:
    """How this rank's pieces are cut in chunks.

    size: L. ranges: of each piece, its chunks [first, last). lengths: the numbers of tokens that chunks have; kinds: of each
    chunk, which of them. starts: the number of each piece among those that start a document, or None. continuing: the pieces that
    continue a document from an earlier segment, each with its segment.

    Where some chunks are not full: chunks, the indices of all of them, tokens at their first slots; slots, the slot of each row
    ``[T]``; short, the numbers of those that are not full, and ends, their indices with tokens at their last slots. Else these
    are None.
    """

    size: int
    ranges: tuple[tuple[int, int], ...]
    lengths: Tensor
    kinds: tuple[int, ...]
    starts: tuple[int | None, ...]
    continuing: tuple[tuple[int, int], ...]
    chunks: _Indices | None = None
    slots: Tensor | None = None
    short: Tensor | None = None
    ends: _Indices | None = None

    @property
    def num_chunks(self) -> int:
        return len(self.kinds)


def chunk_plan(layout: SequenceLayout, device: torch.device) -> ChunkPlan:
    """The plan for the pieces that the layout gives this rank; made once for a layout."""
    return layout.cached(("exponentials", device), lambda: _plan(layout, device))


def continuing_pieces(layout: SequenceLayout) -> dict[int, int]:
    """Numbers of the pieces that continue a document from an earlier segment, and their segments."""
    seen: set[int] = set()
    found = {}
    for number, piece in enumerate(layout.pieces):
        if piece.segment not in seen and not piece.starts_document:
            found[number] = piece.segment
        seen.add(piece.segment)
    return found


def _plan(layout: SequenceLayout, device: torch.device) -> ChunkPlan:
    pieces = layout.pieces
    longest = max(piece.num_tokens for piece in pieces)
    size = min(MOST_TOKENS, 1 << (longest - 1).bit_length())
    ranges: list[tuple[int, int]] = []
    bounds: list[tuple[int, int]] = []
    starts: list[int | None] = []
    num_starts = 0
    for piece in pieces:
        first = len(bounds)
        bounds += [(start, min(start + size, piece.stop)) for start in range(piece.start, piece.stop, size)]
        ranges.append((first, len(bounds)))
        starts.append(num_starts if piece.starts_document else None)
        num_starts += piece.starts_document
    lengths = [stop - start for start, stop in bounds]
    distinct = sorted(set(lengths))
    plan = ChunkPlan(
        size=size,
        ranges=tuple(ranges),
        lengths=index_of(distinct, device),
        kinds=tuple(distinct.index(length) for length in lengths),
        starts=tuple(starts),
        continuing=tuple(continuing_pieces(layout).items()),
    )
    if distinct == [size]:
        return plan
    short = [number for number, length in enumerate(lengths) if length < size]
    slots = torch.cat([number * size + torch.arange(length) for number, length in enumerate(lengths)])
    return replace(
        plan,
        chunks=_indices(bounds, size, False, device),
        slots=slots.to(device),
        short=index_of(short, device),
        ends=_indices([bounds[number] for number in short], size, True, device),
    )


def _indices(bounds: Sequence[tuple[int, int]], size: int, at_end: bool, device: torch.device) -> _Indices:
    rows = torch.full((len(bounds), size), -1)
    for slots, (start, stop) in zip(rows, bounds, strict=True):
        first = size - (stop - start) if at_end else 0
        slots[first : first + stop - start] = torch.arange(start, stop)
    rows = rows.flatten()
    return _Indices(rows.clamp(min=0).to(device), (rows < 0).nonzero().squeeze(1).to(device))


def powers(a: Tensor, counts: Tensor) -> Tensor:
    """e^{count · a} ``[..., counts, N]`` of a ``[..., N]``, in the dtype of a."""
    wide = a.to(torch.complex128 if a.is_complex() else torch.float64).unsqueeze(-2)
    return (wide * counts.to(torch.float64).unsqueeze(-1)).exp().to(a.dtype)


def taps_of(a: Tensor, c: Tensor, num_taps: int) -> Tensor:
    """h ``[C, num_taps]`` of a, c ``[C, N]``."""
    h = (c.unsqueeze(-2) * powers(a, torch.arange(num_taps, device=a.device))).sum(-1)
    return h.real if h.is_complex() else h


def in_chunks(x: Tensor, plan: ChunkPlan) -> tuple[Tensor, Tensor | None]:
    """The tokens of x ``[B, T, C]`` chunk by chunk, ``[C, B · n, L]`` in the dtype that is computed in, zero where there is none.

    And those of the chunks that are not full once more, at their last slots; None where all are full.
    """
    ends = None if plan.ends is None else _spread(x, plan, plan.ends)
    return _spread(x, plan, plan.chunks), ends


def _spread(x: Tensor, plan: ChunkPlan, indices: _Indices | None) -> Tensor:
    if indices is not None:
        x = x.index_select(1, indices.rows).index_fill_(1, indices.gaps, 0)
    spread = x.to(accumulation_dtype(x.dtype)).unflatten(1, (-1, plan.size)).permute(3, 0, 1, 2)
    return spread.reshape(x.shape[2], -1, plan.size).contiguous()


def in_rows(chunks: Tensor, num_rows: int, plan: ChunkPlan) -> Tensor:
    """The tokens ``[B, T, C]`` of ``[C, B · n, L]``; num_rows: B."""
    # Products of matrices that lie across memory would copy them one by one.
    if chunks.requires_grad:
        chunks.register_hook(_laid_out)
    tokens = chunks.unflatten(1, (num_rows, -1)).flatten(2).permute(1, 2, 0)
    return tokens.contiguous() if plan.slots is None else tokens.index_select(1, plan.slots)


def _laid_out(grad: Tensor | None) -> Tensor | None:
    """A gradient in its own order; None where there is none, as of an output that a loss does not take."""
    return None if grad is None else grad.contiguous()


def written(chunks: Tensor, ends: Tensor | None, num_rows: int, a: Tensor, plan: ChunkPlan) -> Tensor:
    """What each chunk writes into the state from zero, ``[n, B, C, N]``, of `in_chunks` and a ``[C, N]``."""

    def write(a: Tensor, chunks: Tensor, *ends: Tensor) -> Tensor:
        weights = _as_numbers(powers(a, torch.arange(plan.size - 1, -1, -1, device=a.device)))
        states = _by_chunk(torch.bmm(chunks, weights), num_rows, a)
        if plan.short is None:
            return states
        return states.index_copy(0, plan.short, _by_chunk(torch.bmm(ends[0], weights), num_rows, a))

    tensors = (a, chunks) if ends is None else (a, chunks, ends)
    return by_channels(write, _block(chunks), (0,) * len(tensors), 2, *tensors)


def read_inside(chunks: Tensor, a: Tensor, c: Tensor, plan: ChunkPlan) -> Tensor:
    """What tokens read of their chunk, ``[C, B · n, L]``."""

    def read(chunks: Tensor, a: Tensor, c: Tensor) -> Tensor:
        h = F.pad(taps_of(a, c, plan.size), (plan.size - 1, 0))
        # Row s holds h_{t-s} for every t.
        return torch.bmm(chunks, h.unfold(-1, plan.size, 1).flip(1))

    return by_channels(read, _block(chunks), (0, 0, 0), 0, chunks, a, c)


def read_states(states: Tensor, a: Tensor, c: Tensor, plan: ChunkPlan) -> Tensor:
    """What tokens read of the states before their chunks ``[n, B, C, N]``: ``[C, B · n, L]``."""

    def read(states: Tensor, a: Tensor, c: Tensor) -> Tensor:
        weights = c.unsqueeze(-2) * powers(a, torch.arange(1, plan.size + 1, device=a.device))
        # The real part of a product.
        by_channel = _as_numbers(states.permute(2, 1, 0, 3)).flatten(1, 2)
        return torch.bmm(by_channel, _as_numbers(weights, -1).mT)

    block = max(1, _NUMBERS // (plan.num_chunks * plan.size * states.shape[1]))
    return by_channels(read, block, (2, 0, 0), 0, states, a, c)


def _block(chunks: Tensor) -> int:
    return max(1, _NUMBERS // chunks[0].numel())


def _by_chunk(found: Tensor, num_rows: int, a: Tensor) -> Tensor:
    """States ``[chunks, B, C, N]`` of ``[C, B · chunks, q · N]``."""
    states = torch.complex(*found.chunk(2, dim=-1)) if a.is_complex() else found
    return states.unflatten(1, (num_rows, -1)).permute(2, 1, 0, 3)


def _as_numbers(z: Tensor, sign: int = 1) -> Tensor:
    """``[..., N]`` as real numbers ``[..., q · N]``: real parts, then imaginary ones times `sign`."""
    return torch.cat([z.real, sign * z.imag], dim=-1) if z.is_complex() else z


def scan(writes: Tensor, starts: Tensor | None, a: Tensor, plan: ChunkPlan) -> tuple[Tensor, Tensor]:
    """The states that enter the chunks, and those that leave the pieces.

    Args:
        writes: of `written`, ``[n, B, C, N]``.
        starts: states before the pieces that start a document, ``[pieces, B, C, N]``; None is zeros. Other pieces start from
        zero. a: ``[C, N]``.

    Returns:
        ``[n, B, C, N]`` and ``[pieces, B, C, N]``.
    """
    states, ends = _Scan.apply(writes, starts, _factors(a, plan), plan)
    return states, ends


def with_incoming(states: Tensor, incoming: Tensor, a: Tensor, plan: ChunkPlan) -> Tensor:
    """The states that enter the chunks, ``[n, B, C, N]``, with what enters this rank's segments beside them.

    states: of `scan`, where pieces that continue a document start from zero. incoming: ``[segments, B, C, N]``. Its gradient
    reaches `incoming` on every rank.
    """
    result: Tensor = _Enter.apply(states, incoming, _factors(a, plan), plan)
    return result


def _factors(a: Tensor, plan: ChunkPlan) -> Tensor:
    """A of a chunk of each length, ``[lengths, C, N]``."""
    return powers(a, plan.lengths).transpose(0, 1)


class _Scan(torch.autograd.Function):
    """S_out = A ⊙ S_in + U from chunk to chunk of each piece.

    | | shape | |
    |---|---|---|
    | writes | [n, B, C, N] | U |
    | starts | [pieces that start a document, B, C, N] or None | |
    | factors | [lengths, C, N] | A of a chunk of each length |
    | states | [n, B, C, N] | S_in |
    | ends | [pieces, B, C, N] | S_out of each piece's last chunk |

    Backward, from the last chunk of a piece to the first: dU = dS_out, dA += dS_out ⊙ S_in, dS_in += A ⊙ dS_out (A and S_in
    conjugate).
    """

    @staticmethod
    def forward(
        ctx: Any, writes: Tensor, starts: Tensor | None, factors: Tensor, plan: ChunkPlan
    ) -> tuple[Tensor, Tensor]:
        states = torch.empty_like(writes, memory_format=torch.contiguous_format)
        ends = writes.new_empty(len(plan.ranges), *writes.shape[1:])
        for piece, (first, last) in enumerate(plan.ranges):
            start = plan.starts[piece]
            if starts is None or start is None:
                states[first].zero_()
            else:
                states[first] = starts[start]
            for chunk in range(first, last):
                leaving = states[chunk + 1] if chunk + 1 < last else ends[piece]
                torch.addcmul(writes[chunk], factors[plan.kinds[chunk]], states[chunk], out=leaving)
        ctx.save_for_backward(factors, states)
        ctx.plan, ctx.has_starts = plan, starts is not None
        ctx.set_materialize_grads(False)
        return states, ends

    @staticmethod
    @first_order
    def backward(
        ctx: Any, grad_states: Tensor | None, grad_ends: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor, None]:
        factors, states = ctx.saved_tensors
        plan: ChunkPlan = ctx.plan
        factors, grad_factors = factors.conj_physical(), torch.zeros_like(factors)
        grad_writes = torch.empty_like(states)
        num_starts = sum(start is not None for start in plan.starts)
        grad_starts = states.new_empty(num_starts, *states.shape[1:]) if ctx.has_starts else None
        for piece, (first, last) in enumerate(plan.ranges):
            grad = torch.zeros_like(states[0]) if grad_ends is None else grad_ends[piece]
            for chunk in range(last - 1, first - 1, -1):
                grad_writes[chunk] = grad
                kind = plan.kinds[chunk]
                grad_factors[kind] += (grad * states[chunk].conj_physical()).sum(0)
                grad = factors[kind] * grad
                if grad_states is not None:
                    grad += grad_states[chunk]
            start = plan.starts[piece]
            if grad_starts is not None and start is not None:
                grad_starts[start] = grad
        return grad_writes, grad_starts, grad_factors, None


class _Enter(torch.autograd.Function):
    """Adds to the states of pieces' chunks what of an incoming state is left there: R_first = S, R ← A ⊙ R from chunk to chunk.

    | | shape | |
    |---|---|---|
    | states | [n, B, C, N] | |
    | incoming | [segments, B, C, N] | S of the first piece of each segment that continues a document |
    | factors | [lengths, C, N] | A of a chunk of each length |
    | result | [n, B, C, N] | states + R |

    Backward, from the last chunk of a piece to the first: dA += dR_next ⊙ R, dR = d(result) + A ⊙ dR_next (A and R conjugate).
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, incoming: Tensor, factors: Tensor, plan: ChunkPlan) -> Tensor:
        ctx.save_for_backward(incoming, factors)
        ctx.plan = plan
        if not plan.continuing:
            return states.view_as(states)
        result = states.clone()
        for piece, segment in plan.continuing:
            for chunk, left in _left(incoming[segment], factors, piece, plan):
                result[chunk] += left
        return result

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (grad_states,) = grads
        incoming, factors = ctx.saved_tensors
        grad_incoming, grad_factors = torch.zeros_like(incoming), torch.zeros_like(factors)
        conjugate = factors.conj_physical()
        for piece, segment in ctx.plan.continuing:
            chunks = list(_left(incoming[segment], factors, piece, ctx.plan))
            grad = grad_states[chunks[-1][0]].clone()
            for chunk, left in reversed(chunks[:-1]):
                kind = ctx.plan.kinds[chunk]
                grad_factors[kind] += (grad * left.conj_physical()).sum(0)
                grad = torch.addcmul(grad_states[chunk], conjugate[kind], grad)
            grad_incoming[segment] = grad
        return grad_states, grad_incoming, grad_factors, None


def _left(state: Tensor, factors: Tensor, piece: int, plan: ChunkPlan) -> Iterator[tuple[int, Tensor]]:
    """What is left of a state that enters a piece at each of its chunks."""
    first, last = plan.ranges[piece]
    for chunk in range(first, last):
        yield chunk, state
        state = factors[plan.kinds[chunk]] * state
