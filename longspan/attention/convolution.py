"""A short causal convolution along the sequence, whose tokens are split over ranks: `causal_conv1d`.

Shapes: B batch rows, T this rank's tokens (all tokens without a layout), C channels, W taps, D documents.

A token needs the W − 1 before it, and the first ones of a segment need the halo (longspan/exchange/halo.py). The nodes are created
in this order, and run backward in the reverse one:

    start halo     x -> sends launched
    inside         x -> y, and z of the head rows    every token, as if nothing stood before the rank's pieces   (_Inside)
    wait           -> the halo
    heads          z of the head rows, halo -> their y                                     (at most W − 1 rows per segment)
    place          y, written in place                                                                         (PlaceRows)

so that the one pass over all tokens hides the exchange in both directions.

Inside, a convolution of a few taps is bound by memory: tokens are taken in tiles that stay in a core's cache, W shifted
multiply-adds and the activation each, and backward computes the pre-activation of a tile again rather than keeping it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.attention.opaque import CONVOLUTION, bounds_of
from longspan.attention.together import Together
from longspan.checks import check_choice, check_flag, check_not_empty, check_tensor, check_tensors
from longspan.errors import InputError
from longspan.exchange.all_reduce import JoinSum, sum_over_ranks
from longspan.exchange.halo import halo_plan, start_halo
from longspan.first_order import first_order
from longspan.layout import Piece, SequenceLayout
from longspan.layout.sequence_layout import check_layout, check_packed, stops_graphs
from longspan.ops.backends import DTYPES, choose_backend, require_gpu, require_package
from longspan.tracing import has_no_values, outside_graphs, unseen_by_checkpointing

ACTIVATIONS = ("silu", "swish")
CONVOLUTION_BACKENDS = ("torch", "triton")
MAX_TAPS_OF_KERNELS = 8
# Numbers of a tile: small enough that its handful of temporaries stay in a core's cache, large enough that calling an
# operator costs little. Elsewhere there is no such cache, and launches are what costs.
_TILE_NUMBERS_CPU = 1 << 17
_TILE_NUMBERS_DEVICE = 1 << 26


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    layout: SequenceLayout | None = None,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Depthwise causal convolution ``y_t = act(bias + Σ_j weight[:, j] · x_{t-W+1+j})`` over the tokens of t's document.

    Args:
        x: ``[B, T, C]``, float64, float32 or bfloat16 (with ``"triton"`` float32, bfloat16 or float16); T is this rank's number of
            tokens, or the whole length without a layout.
        weight: ``[C, W]``, the dtype of x; its last column is for the token itself. The same on every rank. Its gradient on a rank
            is that rank's share: sum it over the ranks, like any parameter's.
        bias: ``[C]``, the dtype of x, or None; its gradient likewise.
        activation: ``"silu"`` (``"swish"`` is the same), or None.
        layout: which tokens this rank holds, and the documents, which never see each other; None is one device and one document.
            With documents, B is 1.
        initial_state: the W − 1 tokens before the first global token, ``[B, W-1, C]``, or before each document, ``[D, W-1, C]``,
            the oldest first; the dtype of x; the same on every rank, its gradient a rank's share. None is zeros.
        output_final_state: also return the last W − 1 tokens (of each document) on every rank: the initial state of what follows.
        backend: which code computes: ``"torch"``, plain PyTorch operations on any device; ``"triton"``, kernels for NVIDIA GPUs and
            at most 8 taps. None is ``"triton"`` where it runs and takes the inputs, else ``"torch"``.

    Returns:
        y ``[B, T, C]`` in the dtype of x, computed in float32 (float64) and rounded once; with `output_final_state`, the pair
        (y, final_state), final_state shaped like `initial_state`. Its gradient is the sum of what every rank sends back. Ranks
        may let y, the final state or both enter their losses.

    Every rank must take the same calls in the same order, backward too.

    Raises:
        InputError: for shapes, dtypes, devices or an activation that do not fit, or a backend that cannot run.
        LayoutError: if T is not the layout's number of local tokens, or the layout has ranks but no process group.
    """
    if stops_graphs(layout):
        return _convolve_outside_graphs(
            x, weight, bias, activation, layout,
            initial_state=initial_state, output_final_state=output_final_state, backend=backend,
        )  # fmt: skip
    check_tensors("causal_conv1d", x=x, weight=weight)
    fits = weight.dim() == 2 and weight.shape[1] <= MAX_TAPS_OF_KERNELS
    backend = choose_backend("causal_conv1d", CONVOLUTION_BACKENDS, x, fits, backend)
    layout = check_tokens(x, layout, "causal_conv1d", backend)
    _check_parameters(x, weight, bias, activation)
    check_flag("causal_conv1d", "output_final_state", output_final_state)
    width = weight.shape[1] - 1
    check_initial_state("causal_conv1d", initial_state, x, (width,), "the W - 1 tokens before", layout)
    # A compiler traces kernels as they are: they have operators of their own.
    if has_no_values(x) and (backend == "torch" or not torch.compiler.is_compiling()):
        bounds = bounds_of(layout, x)
        y, final_state = CONVOLUTION(x, weight, bias, initial_state, bounds, activation, output_final_state)
        return (y, final_state) if output_final_state else y
    return _computed(x, weight, bias, activation, layout, initial_state, output_final_state, backend)


_convolve_outside_graphs = outside_graphs(causal_conv1d)


@unseen_by_checkpointing
def _computed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    layout: SequenceLayout,
    initial_state: Tensor | None,
    output_final_state: bool,
    backend: str,
) -> Tensor | tuple[Tensor, Tensor]:
    width = weight.shape[1] - 1
    with_initial = initial_state is not None and width > 0
    make_form = _triton_form if backend == "triton" else _torch_form
    form = make_form(layout, width, with_initial, x, activation is not None)
    with_halo = not halo_plan(layout, width).is_empty
    joins = torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in (weight, bias, initial_state))
    pending = start_halo(x, layout, width, adds_in_place=True, joins=joins) if with_halo else None
    y, z_heads = form.inside(x if pending is None else pending.x, weight, bias)
    halo = None if pending is None else pending.wait()
    if halo is not None or with_initial:
        heads = kept_heads(layout, width, with_initial, x.device)
        before = before_heads(halo, initial_state if with_initial else None, heads, layout)
        y = PlaceRows.apply(y, form.of_heads(z_heads, before, weight), heads.rows)
    if not output_final_state:
        return y
    final_state = final_tokens(x, initial_state, layout, width, joins=y.requires_grad)
    return Together.apply(y, final_state) if layout.num_ranks > 1 else (y, final_state)


# ------------------------------------------------------------------------------------------------------------------- checks


def check_tokens(x: Tensor, layout: SequenceLayout | None, name: str, backend: str = "torch") -> SequenceLayout:
    """The layout of x ``[B, T, C]``, one rank's where none is given; raises as `causal_conv1d` does, naming the operator."""
    check_tensor(name, "x", x)
    if x.dim() != 3:
        raise InputError(
            f"{name} takes x [B, T, C]; got shape {tuple(x.shape)}. Lay the channels of all heads side by side: x.flatten(2)"
        )
    check_not_empty(name, "x", x, "row, token and channel")
    if x.dtype not in DTYPES[backend]:
        *names, last = [str(dtype).removeprefix("torch.") for dtype in DTYPES[backend]]
        with_backend = "" if backend == "torch" else f" with backend={backend!r}"
        raise InputError(
            f"{name} takes {', '.join(names)} or {last}{with_backend}; got x of {x.dtype}. Convert it before the call"
        )
    if layout is None:
        return SequenceLayout.local(x.shape[1])
    check_layout(layout, x.shape[1], name, sends=not has_no_values(x))
    check_packed(name, x, layout)
    return layout


def _check_parameters(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> None:
    num_channels = x.shape[2]
    if weight.dim() != 2 or weight.shape[0] != num_channels or weight.shape[1] < 1:
        hint = " It looks like [W, C]: transpose it" if weight.dim() == 2 and weight.shape[1] == num_channels else ""
        if weight.dim() == 3 and weight.shape[1] == 1:
            hint = " It looks like the weight of torch.nn.Conv1d: take weight.squeeze(1)"
        raise InputError(
            f"causal_conv1d takes weight [C, W] with C = {num_channels}, as x has, and W at least 1; "
            f"got {tuple(weight.shape)}.{hint or ' Pass one row of taps a channel'}"
        )
    if bias is not None:
        check_tensors("causal_conv1d", bias=bias)
        if tuple(bias.shape) != (num_channels,):
            raise InputError(
                f"causal_conv1d takes bias [C] = ({num_channels},) or None; got {tuple(bias.shape)}. Expand it, or leave it out"
            )
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and (parameter.dtype != x.dtype or parameter.device != x.device):
            raise InputError(
                f"causal_conv1d takes x and {name} of one dtype on one device; got x {x.dtype} on {x.device} and {name} "
                f"{parameter.dtype} on {parameter.device}. Convert {name} with {name}.to(x)"
            )
    remedy = "Apply any other to what the call returns"
    check_choice("causal_conv1d", "activation", activation, ACTIVATIONS, remedy, or_none=True)


def check_initial_state(
    name: str, initial_state: Tensor | None, x: Tensor, width: tuple[int, ...], meaning: str, layout: SequenceLayout
) -> None:
    """Raise InputError unless the initial state of x ``[B, T, C]`` is None or of a shape ``[B or num_documents, *width, C]``."""
    if initial_state is None:
        return
    check_tensor(name, "initial_state", initial_state)
    rows, first = (layout.num_documents, "num_documents") if layout.is_packed else (x.shape[0], "B")
    expected = (rows, *width, x.shape[2])
    fits = initial_state.dtype == x.dtype and initial_state.device == x.device
    if tuple(initial_state.shape) != expected or not fits:
        dims = ", ".join([first, *("W-1" for _ in width), "C"])
        raise InputError(
            f"{name}: initial_state must be {meaning}, [{dims}] = {expected} in {x.dtype} on "
            f"{x.device}; got {tuple(initial_state.shape)} in {initial_state.dtype} on {initial_state.device}. Convert it with "
            "initial_state.to(x)"
        )


# -------------------------------------------------------------------------------------------------------------------- plans


@dataclass(frozen=True)
class _Tile:
    """Local rows ``[start, stop)`` that are computed together, and the `context` rows of the same piece before them.

    A tile of one piece is a plain range of rows. One of several pieces is spread out over slots, with W − 1 zero slots between two
    pieces, so that no tap reaches from one into another. Rows and slots count from the tile's start, in `source` and `gaps` from
    its context.

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
        return rows.to(_compute_dtype(x))

    def rows_of(self, spread: Tensor) -> Tensor:
        """The tile's rows of ``[B, slots, C]``."""
        return spread if self.slots is None else spread.index_select(1, self.slots)


@dataclass(frozen=True)
class Heads:
    """Rows whose taps reach before this rank's piece, into the halo or an initial state.

    They are the first W − 1 of some pieces: of these *heads* those that continue a document from an earlier segment come first.

    rows: local rows, ascending. head, offset: the head of each, and its place in the piece. segments: those of the continuing
    heads. started: the documents of the other heads, which start one. continued: of each continuing head, the document, and the
    number of its tokens before the head.
    """

    rows: Tensor
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


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


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
        tiles = tuple(_tiles(layout.pieces, width, limit, heads.rows.tolist(), x.device))
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
        head=index_of(head_of, device),
        offset=index_of(offset_of, device),
        segments=index_of([piece.segment for piece, _ in continuing], device),
        started=index_of([piece.document for piece in starting], device),
        continued=tuple((piece.document, distance) for piece, distance in continuing),
    )


def kept_heads(layout: SequenceLayout, width: int, with_initial: bool, device: torch.device) -> Heads:
    """`heads_of`, made once a layout."""
    key = ("heads", width, with_initial, device)
    return layout.cached(key, lambda: heads_of(layout, width, with_initial, device))


def index_of(numbers: Sequence[int], device: torch.device) -> Tensor:
    """`numbers` as an index, int64, on `device`."""
    return torch.tensor(numbers, dtype=torch.int64).to(device)


@dataclass(frozen=True)
class _Run:
    """Rows ``[start, stop)`` of one piece, from the slot `slot` of their tile on."""

    start: int
    stop: int
    slot: int


def _tiles(
    pieces: Sequence[Piece], width: int, limit: int, head_rows: list[int], device: torch.device
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
                yield _tile(runs, context, width, head_rows, device)
                runs, slot = [], 0
            if not runs:
                context = min(width, row - piece.start)
            stop = min(piece.stop, row + limit - slot)
            runs.append(_Run(row, stop, slot))
            row = stop
            if row < piece.stop:
                yield _tile(runs, context, width, head_rows, device)
                runs = []
    if runs:
        yield _tile(runs, context, width, head_rows, device)


def _tile(runs: list[_Run], context: int, width: int, head_rows: list[int], device: torch.device) -> _Tile:
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


# --------------------------------------------------------------------------------------------------------------------- forms


class _Form(Protocol):
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


def _torch_form(layout: SequenceLayout, width: int, with_initial: bool, x: Tensor, silu: bool) -> _Form:
    return _TorchForm(_conv_plan(layout, width, with_initial, x), silu)


def _triton_form(layout: SequenceLayout, width: int, with_initial: bool, x: Tensor, silu: bool) -> _Form:
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


# ------------------------------------------------------------------------------------------------------------- inside a rank


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
        taps, wide_bias = _taps(weight, x), None if bias is None else bias.to(_compute_dtype(x))
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
        taps, wide_bias = _taps(weight, x), None if bias is None else bias.to(_compute_dtype(x))
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
    return weight.t().flip(0).to(_compute_dtype(x)).contiguous()


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


# ---------------------------------------------------------------------------------------------------------------- head rows


def before_heads(halo: Tensor | None, initial_state: Tensor | None, heads: Heads, layout: SequenceLayout) -> Tensor:
    """The W − 1 tokens before each head, ``[heads, B, W-1, C]``."""
    continuing = None if halo is None else halo.index_select(0, heads.segments)
    if initial_state is None:
        assert continuing is not None
        return continuing
    states = initial_state.unsqueeze(0) if layout.documents is None else initial_state.unsqueeze(1)
    parts = [states.index_select(0, heads.started)]
    if continuing is not None:
        # A document that started fewer than W − 1 tokens ago leaves older slots to its initial state.
        width = states.shape[2]
        shifted = [
            F.pad(states[document, :, min(distance, width) :], (0, 0, 0, min(distance, width)))
            for document, distance in heads.continued
        ]
        parts.insert(0, continuing + torch.stack(shifted) if shifted else continuing)
    return torch.cat(parts)


def _from_before(before: Tensor, weight: Tensor, heads: Heads) -> Tensor:
    """What the tokens before the heads add to z of the head rows, ``[B, R, C]``."""
    width = weight.shape[1] - 1
    dtype = _compute_dtype(weight)
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


# -------------------------------------------------------------------------------------------------------------- final state


@dataclass(frozen=True)
class _FinalRows:
    """Local rows among the last W − 1 tokens of their document, and their places among D · (W − 1).

    For documents shorter than that: the places that keep a token of the initial state, and the tokens' places there.
    """

    rows: Tensor
    places: Tensor
    kept: Tensor
    kept_from: Tensor


def _final_rows(layout: SequenceLayout, width: int, device: torch.device) -> _FinalRows:
    bounds = layout.document_bounds
    rows: list[int] = []
    places: list[int] = []
    kept: list[int] = []
    kept_from: list[int] = []
    for piece in layout.pieces:
        # The place of the piece's first token, were there room for all of the document.
        first = width - (bounds[piece.document + 1] - piece.global_start)
        own = range(max(0, -first), piece.num_tokens)
        rows += [piece.start + offset for offset in own]
        places += [piece.document * width + first + offset for offset in own]
    for document in range(layout.num_documents):
        length = bounds[document + 1] - bounds[document]
        kept += range(document * width, document * width + width - length)
        kept_from += range(document * width + length, document * width + width)
    return _FinalRows(*(index_of(numbers, device) for numbers in (rows, places, kept, kept_from)))


def final_tokens(x: Tensor, initial_state: Tensor | None, layout: SequenceLayout, width: int, joins: bool) -> Tensor:
    """The last W − 1 tokens, ``[B, W-1, C]``, or of each document, ``[D, W-1, C]``, on every rank.

    joins: take part in the sum's backward even if x takes no gradient here: that of other ranks may.
    """
    batch, _, num_channels = x.shape
    if width == 0:
        empty = x[:, :0].reshape(batch if layout.documents is None else layout.num_documents, 0, num_channels)
        return empty if initial_state is None else empty + initial_state
    plan = layout.cached(("final_tokens", width, x.device), lambda: _final_rows(layout, width, x.device))
    # Each token has one owner, so that summing is exact forward; gradients are summed as precisely as anywhere.
    tokens = x.index_select(1, plan.rows).to(_compute_dtype(x))
    state = tokens.new_zeros(batch, layout.num_documents * width, num_channels).index_copy(1, plan.places, tokens)
    if layout.num_ranks > 1:
        state = sum_over_ranks(state, layout)
        if joins and not state.requires_grad:
            state = JoinSum.apply(state, state.new_zeros((), requires_grad=True), layout)
    state = state.to(x.dtype)
    if initial_state is not None and len(plan.kept):
        flat = initial_state.reshape(state.shape)
        state = state.index_copy(1, plan.kept, flat.index_select(1, plan.kept_from))
    return state if layout.documents is None else state.view(layout.num_documents, width, num_channels)
