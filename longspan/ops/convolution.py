"""A short causal convolution on one device, in two phases: all tokens as if nothing stood before their pieces, then the first rows.

Shapes: B batch rows, T tokens, C channels, W taps; R head rows, whose taps reach before their piece.

A convolution of a few taps is bound by memory: tokens are taken in tiles that stay in a core's cache, W shifted multiply-adds and
the activation each, and backward computes the pre-activation of a tile again rather than keeping it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.dtypes import accumulation_dtype
from longspan.errors import InputError
from longspan.first_order import first_order
from longspan.layout import Piece, SequenceLayout
from longspan.layout.rows import index_of
from longspan.ops.backends import require_gpu, require_package

CONVOLUTION_BACKENDS = ("torch", "triton")
MAX_TAPS_OF_KERNELS = 8
# Numbers of a tile: small enough that its handful of temporaries stay in a core's cache, large enough that calling an
# operator costs little. Elsewhere there is no such cache, and launches are what costs.
_TILE_NUMBERS_CPU = 1 << 17
_TILE_NUMBERS_DEVICE = 1 << 26


@dataclass(frozen=True)
class _Tile:
    """Local rows ``[start, stop)`` that are computed together, and the `context` rows of the same piece before them.

    A tile of one piece is a plain range of rows. One of several pieces is spread out over slots, with W − 1 zero slots between
    two pieces, so that no tap reaches from one into another. Rows and slots count from the tile's start, in `source` and `gaps`
    from its context.

    slots: the slot of each of the tile's rows. source: the row of each slot, any where it is one of the `gaps`.
    heads: range of the plan's head rows that lie in the tile; head_slots: their slots.
    """

    start: int
    stop: int
    context: int
    source: Tensor | None
    gaps: Tensor | None
    slots: Tensor | None
    heads: slice
    head_slots: Tensor | None

    def spread(self, x: Tensor) -> Tensor:
        """Rows of the tile and its context, ``[B, context + slots, C]``, in the dtype that is computed in."""
        rows = x[:, self.start - self.context : self.stop]
        if self.source is not None and self.gaps is not None:
            rows = rows.index_select(1, self.source).index_fill_(1, self.gaps, 0)
        return rows.to(accumulation_dtype(x.dtype))

    def rows_of(self, spread: Tensor) -> Tensor:
        """The tile's rows of ``[B, slots, C]``."""
        return spread if self.slots is None else spread.index_select(1, self.slots)


@dataclass(frozen=True)
class Heads:
    """Rows whose taps reach before this rank's piece, into the halo or an initial state.

    They are the first W − 1 of some pieces: of these *heads* those that continue a document from an earlier segment come first.

    rows: local rows, ascending. numbers: the same, as the host knows them. longest: rows of the longest head. head, offset: the
    head of each row, and its place in the piece. segments: those of the continuing heads. started: the documents of the other
    heads, which start one. continued: of each continuing head, the document, and the number of its tokens before the head.
    """

    rows: Tensor
    numbers: tuple[int, ...]
    longest: int
    head: Tensor
    offset: Tensor
    segments: Tensor
    started: Tensor
    continued: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class _ConvPlan:
    width: int
    heads: Heads
    tiles: tuple[_Tile, ...]
    rows_of_batch: int


def _conv_plan(layout: SequenceLayout, width: int, with_initial: bool, x: Tensor) -> _ConvPlan:
    """How one call goes over its tokens; made once for a layout and a size of x."""
    batch, num_tokens, num_channels = x.shape
    # One thread takes one tile's rows at a time, whatever the operator.
    on_cpu = x.device.type == "cpu"
    numbers = _TILE_NUMBERS_CPU * torch.get_num_threads() if on_cpu else _TILE_NUMBERS_DEVICE
    # A tile of few tokens would mostly read its context: rather fewer rows of the batch.
    fewest = min(num_tokens, 16 * (width + 1))
    rows_of_batch = min(batch, max(1, numbers // (num_channels * fewest)))
    limit = max(fewest, numbers // (num_channels * rows_of_batch))

    def build() -> _ConvPlan:
        heads = kept_heads(layout, width, with_initial, x.device)
        tiles = tuple(_cut_into_tiles(layout.pieces, width, limit, heads.numbers, x.device))
        return _ConvPlan(width, heads, tiles, rows_of_batch)

    return layout.cached(("convolution", width, with_initial, rows_of_batch, limit, x.device), build)


def heads_of(layout: SequenceLayout, width: int, with_initial: bool, device: torch.device) -> Heads:
    """The rows of this rank that read something from before their piece: at most `width` of each."""
    continuing: list[tuple[Piece, int]] = []
    starting: list[Piece] = []
    seen: set[int] = set()
    for piece in layout.pieces:
        if not piece.starts_document and piece.segment not in seen:
            continuing.append((piece, piece.global_start - layout.document_bounds[piece.document]))
        elif with_initial and piece.starts_document:
            starting.append(piece)
        seen.add(piece.segment)
    rows = []
    for head, piece in enumerate([*(piece for piece, _ in continuing), *starting]):
        rows += [(piece.start + offset, head, offset) for offset in range(min(width, piece.num_tokens))]
    local, head_of, offset_of = zip(*sorted(rows), strict=True) if rows else ((), (), ())
    return Heads(
        rows=index_of(local, device),
        numbers=local,
        longest=max(offset_of, default=-1) + 1,
        head=index_of(head_of, device),
        offset=index_of(offset_of, device),
        segments=index_of([piece.segment for piece, _ in continuing], device),
        started=index_of([piece.document for piece in starting], device),
        continued=tuple((piece.document, distance) for piece, distance in continuing),
    )


def kept_heads(layout: SequenceLayout, width: int, with_initial: bool, device: torch.device) -> Heads:
    """`heads_of`, made once per layout."""
    key = ("heads", width, with_initial, device)
    return layout.cached(key, lambda: heads_of(layout, width, with_initial, device))


@dataclass(frozen=True)
class _Run:
    """Rows ``[start, stop)`` of one piece, from the slot `slot` of their tile on."""

    start: int
    stop: int
    slot: int


def _cut_into_tiles(
    pieces: Sequence[Piece], width: int, limit: int, head_rows: Sequence[int], device: torch.device
) -> Iterator[_Tile]:
    """Cut pieces into tiles of at most `limit` slots; short pieces share a tile."""
    runs: list[_Run] = []
    context = 0
    for piece in pieces:
        row = piece.start
        while row < piece.stop:
            slot = runs[-1].slot + runs[-1].stop - runs[-1].start + width if runs else 0
            # Spreading costs a copy: a tile that is half full is left as it is.
            if runs and 2 * slot >= limit:
                yield _make_tile(runs, context, width, head_rows, device)
                runs, slot = [], 0
            if not runs:
                context = min(width, row - piece.start)
            stop = min(piece.stop, row + limit - slot)
            runs.append(_Run(row, stop, slot))
            row = stop
            if row < piece.stop:
                yield _make_tile(runs, context, width, head_rows, device)
                runs = []
    if runs:
        yield _make_tile(runs, context, width, head_rows, device)


def _make_tile(runs: list[_Run], context: int, width: int, head_rows: Sequence[int], device: torch.device) -> _Tile:
    start, stop = runs[0].start, runs[-1].stop
    heads = slice(bisect_left(head_rows, start), bisect_left(head_rows, stop))
    head_slots = torch.tensor(head_rows[heads], dtype=torch.int64) - start
    source = gaps = slots = None
    if len(runs) > 1 and width > 0:
        slots = torch.cat([torch.arange(run.slot, run.slot + run.stop - run.start) for run in runs])
        source = torch.full((context + int(slots[-1]) + 1,), -1)
        source[:context] = torch.arange(context)
        source[context + slots] = torch.arange(context, context + stop - start)
        gaps = (source < 0).nonzero().squeeze(1).to(device)
        source = source.clamp(min=0).to(device)
        head_slots = slots[head_slots]
        slots = slots.to(device)
    return _Tile(
        start=start,
        stop=stop,
        context=context,
        source=source,
        gaps=gaps,
        slots=slots,
        heads=heads,
        head_slots=head_slots.to(device) if len(head_slots) else None,
    )


class ConvolutionForm(Protocol):
    """The code of one call, in the two phases between which the halo arrives."""

    def inside(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """y ``[B, T, C]`` of x as if nothing stood before this rank's pieces, and z of the head rows, ``[B, R, C]``."""

    def of_heads(self, z_heads: Tensor, before: Tensor, weight: Tensor) -> Tensor:
        """y of the head rows, ``[B, R, C]``, now that the tokens before the heads are there, ``[heads, B, W-1, C]``."""


@dataclass(frozen=True)
class _TorchForm:
    plan: _ConvPlan
    silu: bool

    def inside(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        y, z_heads = _Inside.apply(x, weight, bias, self.plan, self.silu)
        return y, z_heads

    def of_heads(self, z_heads: Tensor, before: Tensor, weight: Tensor) -> Tensor:
        z = z_heads + _from_before(before, weight, self.plan.heads)
        return (F.silu(z) if self.silu else z).to(before.dtype)


def make_form(
    backend: str, layout: SequenceLayout, width: int, with_initial: bool, x: Tensor, silu: bool
) -> ConvolutionForm:
    """The code of a backend for one call on the tokens that `layout` gives this rank; width: W − 1.

    Raises:
        InputError: for more taps than the kernels take, or a backend that is not there.
    """
    if backend == "torch":
        return _TorchForm(_conv_plan(layout, width, with_initial, x), silu)
    require_package("triton", "triton", "install it with `pip install 'longspan[triton]'`, or use backend='torch'")
    from longspan.ops.triton.convolution import TritonConvolution, rows_of
    from longspan.ops.triton.launch import interpreted

    require_gpu("triton", x.device, interpreted())
    if width >= MAX_TAPS_OF_KERNELS:
        raise InputError(
            f"backend='triton' takes up to {MAX_TAPS_OF_KERNELS} taps; got a weight of {width + 1}. Use backend='torch'"
        )
    heads = kept_heads(layout, width, with_initial, x.device)
    key = ("convolution_rows", width, with_initial, x.device)
    return TritonConvolution(layout.cached(key, lambda: rows_of(layout, width, heads.rows, heads.head)), silu)


def _convolve(x: Tensor, context: int, taps: Tensor, bias: Tensor | None) -> Tensor:
    """z ``[B, n - context, C]`` of ``x [B, n, C]``, taps ``[W, C]`` with the token's own first; tokens before x are zero."""
    z = x[:, context:] * taps[0] if bias is None else torch.addcmul(bias, x[:, context:], taps[0])
    for shift in range(1, len(taps)):
        seeing, seen = _shifted(x.shape[1], context, shift)
        z[:, seeing].addcmul_(x[:, seen], taps[shift])
    return z


def _shifted(num_rows: int, context: int, shift: int) -> tuple[slice, slice]:
    """Rows of z that see a row of x `shift` before them, and those rows of x."""
    first = max(shift - context, 0)
    return slice(first, None), slice(context + first - shift, max(context + first, num_rows) - shift)


class _Inside(torch.autograd.Function):
    """The convolution of a rank's tokens, as if nothing stood before its pieces.

    | | shape | |
    |---|---|---|
    | x, y | [B, T, C] | |
    | weight, bias | [C, W], [C] or None | |
    | z_heads | [B, R, C] | z of the plan's R head rows, float32 or float64; their y is computed without what it lacks |

    Forward: z_t = bias + Σ_w a_w ⊙ x_{t-w}, a_w = weight[:, W-1-w]; y = act(z). Backward: dz = dy ⊙ act'(z), at head rows
    the gradient of z_heads and no dy; dx_t = Σ_w a_w ⊙ dz_{t+w}; da_w = Σ_t dz_t ⊙ x_{t-w}; dbias = Σ_t dz_t. dx is always
    a tensor of its own, which `start_halo` relies on.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, plan: _ConvPlan, silu: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight, bias)
        ctx.plan, ctx.silu = plan, silu
        taps, wide_bias = _taps(weight, x), None if bias is None else bias.to(accumulation_dtype(x.dtype))
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        z_heads = x.new_empty(x.shape[0], len(plan.heads.rows), x.shape[2], dtype=taps.dtype)
        for rows in _batch_slices(x, plan):
            for tile in plan.tiles:
                z = _convolve(tile.spread(x[rows]), tile.context, taps, wide_bias)
                if tile.head_slots is not None:
                    z_heads[rows, tile.heads] = z.index_select(1, tile.head_slots)
                if silu:
                    F.silu(z, inplace=True)
                y[rows, tile.start : tile.stop] = tile.rows_of(z)
        return y, z_heads

    @staticmethod
    @first_order
    def backward(
        ctx: Any, grad_y: Tensor, grad_z_heads: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, weight, bias = ctx.saved_tensors
        plan: _ConvPlan = ctx.plan
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        taps, wide_bias = _taps(weight, x), None if bias is None else bias.to(accumulation_dtype(x.dtype))
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_x else None
        grad_taps, grad_bias = torch.zeros_like(taps), torch.zeros_like(taps[0])
        for rows in _batch_slices(x, plan):
            # What a tile gives to its context belongs to the rows of the tile before it.
            given: Tensor | None = None
            for tile in reversed(plan.tiles):
                spread = tile.spread(x[rows])
                grad_z = tile.spread(grad_y[rows])[:, tile.context :]
                if ctx.silu:
                    z = _convolve(spread, tile.context, taps, wide_bias)
                    grad_z = torch.ops.aten.silu_backward(grad_z, z)
                if tile.head_slots is not None:
                    grad_z = grad_z.index_copy(1, tile.head_slots, grad_z_heads[rows, tile.heads])
                if needs_bias:
                    grad_bias += grad_z.sum((0, 1))
                if needs_weight:
                    _add_grad_taps(grad_taps, grad_z, spread, tile.context)
                if grad_x is not None:
                    given = _backpropagate(grad_z, tile, taps, given, grad_x[rows])
        return (
            grad_x,
            grad_taps.flip(0).t().to(weight.dtype).contiguous() if needs_weight else None,
            grad_bias.to(weight.dtype) if needs_bias else None,
            None,
            None,
        )


def _taps(weight: Tensor, x: Tensor) -> Tensor:
    """``[W, C]``, the token's own tap first, in the dtype that is computed in."""
    return weight.t().flip(0).to(accumulation_dtype(x.dtype)).contiguous()


def _batch_slices(x: Tensor, plan: _ConvPlan) -> list[slice]:
    return [slice(row, row + plan.rows_of_batch) for row in range(0, x.shape[0], plan.rows_of_batch)]


def _add_grad_taps(grad_taps: Tensor, grad_z: Tensor, x: Tensor, context: int) -> None:
    product = torch.empty_like(grad_z, memory_format=torch.contiguous_format)
    for shift in range(len(grad_taps)):
        seeing, seen = _shifted(x.shape[1], context, shift)
        grad_taps[shift] += torch.mul(grad_z[:, seeing], x[:, seen], out=product[:, seeing]).sum((0, 1))


def _backpropagate(grad_z: Tensor, tile: _Tile, taps: Tensor, given: Tensor | None, grad_x: Tensor) -> Tensor | None:
    """Write dx of the tile's rows into ``grad_x [B, T, C]``; take what the next tile gave, and return what this one gives."""
    context = tile.context
    grad = grad_z.new_empty(grad_z.shape[0], context + grad_z.shape[1], grad_z.shape[2])
    grad[:, :context] = 0
    torch.mul(grad_z, taps[0], out=grad[:, context:])
    for shift in range(1, len(taps)):
        seeing, seen = _shifted(grad.shape[1], context, shift)
        grad[:, seen].addcmul_(grad_z[:, seeing], taps[shift])
    if given is not None:
        grad[:, grad.shape[1] - given.shape[1] :] += given
    grad_x[:, tile.start : tile.stop] = tile.rows_of(grad[:, context:])
    return grad[:, :context].clone() if context else None


def _from_before(before: Tensor, weight: Tensor, heads: Heads) -> Tensor:
    """What the tokens before the heads add to z of the head rows, ``[B, R, C]``."""
    width = weight.shape[1] - 1
    dtype = accumulation_dtype(weight.dtype)
    windows = F.pad(before.to(dtype), (0, 0, 0, width - 1)).unfold(2, width, 1)
    added = (windows * weight[:, :-1].to(dtype)).sum(-1)
    return added[heads.head, :, heads.offset].transpose(0, 1)


class PlaceRows(torch.autograd.Function):
    """Write some rows of a tensor in place.

    | | shape | |
    |---|---|---|
    | y | [B, T, C] | written to, and returned |
    | y_rows | [B, R, C] | |
    | rows | [R] | |

    Backward: d(y_rows) = dy at `rows`. y's own gradient is dy unchanged, to save a pass over it: the node that made y takes
    nothing from `rows`.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, y_rows: Tensor, rows: Tensor) -> Tensor:
        ctx.mark_dirty(y)
        ctx.save_for_backward(rows)
        return y.index_copy_(1, rows, y_rows)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (rows,) = ctx.saved_tensors
        return grad, grad.index_select(1, rows), None
