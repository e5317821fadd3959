"""A short causal convolution along the sequence, whose tokens are split over ranks: `causal_conv1d`.

Shapes: B batch rows, T this rank's tokens (all tokens without a layout), C channels, W taps, D documents.

A token needs the W − 1 before it, and the first ones of a segment need the halo (longspan/exchange/halo.py). The nodes are created
in this order, and run backward in the reverse one:

    start halo     x -> sends launched
    inside         x -> y, and z of the head rows    every token, as if nothing stood before the rank's pieces
    wait           -> the halo
    heads          z of the head rows, halo -> their y                                     (at most W − 1 rows per segment)
    place          y, written in place                                                                         (PlaceRows)

so that the one pass over all tokens hides the exchange in both directions.

The passes themselves stand in longspan/ops/convolution.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.attention.one_state import state_of_last, states_of_documents
from longspan.attention.opaque import CONVOLUTION, bounds_of
from longspan.attention.together import Together
from longspan.autocast import as_in_product
from longspan.checks import check_choice, check_flag, check_not_empty, check_tensor, check_tensors
from longspan.dtypes import accumulation_dtype
from longspan.errors import InputError
from longspan.exchange.all_reduce import JoinSum, sum_over_ranks
from longspan.exchange.halo import halo_plan, start_halo
from longspan.layout import SequenceLayout
from longspan.layout.calls import check_layout, check_packed, layout_of_one_device, stops_graphs
from longspan.layout.rows import index_of
from longspan.ops.backends import DTYPES, choose_backend
from longspan.ops.convolution import (
    CONVOLUTION_BACKENDS,
    MAX_TAPS_OF_KERNELS,
    Heads,
    PlaceRows,
    kept_heads,
    make_form,
)
from longspan.tracing import has_no_values, outside_graphs, unseen_by_checkpointing

ACTIVATIONS = ("silu", "swish")


@overload
def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = ..., activation: str | None = ..., layout: SequenceLayout | None = ...,
    *, initial_state: Tensor | None = ..., output_final_state: Literal[False] = ..., backend: str | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = ..., activation: str | None = ..., layout: SequenceLayout | None = ...,
    *, initial_state: Tensor | None = ..., output_final_state: Literal[True], backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = ..., activation: str | None = ..., layout: SequenceLayout | None = ...,
    *, initial_state: Tensor | None = ..., output_final_state: bool, backend: str | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
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
        bias: ``[C]``, the dtype of x, or None; its gradient likewise. Under torch.autocast x, weight, bias and initial_state are
            cast as the inputs of a matrix product are.
        activation: ``"silu"`` (``"swish"`` is the same), or None.
        layout: which tokens this rank holds, and the documents, which never see each other; None is one device and one document.
            With documents, B is 1.
        initial_state: the W − 1 tokens before the first global token, ``[B, W-1, C]``, or before each document, ``[D, W-1, C]``
            (one for all where the layout `continues` a sequence), the oldest first; the dtype of x; the same on every rank, its
            gradient a rank's share. None is zeros.
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
    x, weight = as_in_product(x), as_in_product(weight)
    bias, initial_state = as_in_product(bias), as_in_product(initial_state)
    check_tensors("causal_conv1d", x=x, weight=weight)
    fits = weight.dim() == 2 and weight.shape[1] <= MAX_TAPS_OF_KERNELS
    backend = choose_backend("causal_conv1d", CONVOLUTION_BACKENDS, x, fits, backend)
    layout = check_tokens(x, layout, "causal_conv1d", backend)
    _check_parameters(x, weight, bias, activation)
    check_flag("causal_conv1d", "output_final_state", output_final_state)
    width = weight.shape[1] - 1
    check_initial_state("causal_conv1d", initial_state, x, (width,), "the W - 1 tokens before", layout)
    initial_state = states_of_documents(initial_state, layout)
    # A compiler traces kernels as they are: they have operators of their own.
    if has_no_values(x) and (backend == "torch" or not torch.compiler.is_compiling()):
        bounds = bounds_of(layout, x)
        y, final_state = CONVOLUTION(x, weight, bias, initial_state, bounds, activation, output_final_state)
        return (y, state_of_last(final_state, layout)) if output_final_state else y
    return convolve_over_ranks(x, weight, bias, activation, layout, initial_state, output_final_state, backend)


_convolve_outside_graphs = outside_graphs(causal_conv1d)


@unseen_by_checkpointing
def convolve_over_ranks(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    layout: SequenceLayout,
    initial_state: Tensor | None,
    output_final_state: bool,
    backend: str,
) -> Tensor | tuple[Tensor, Tensor]:
    """`causal_conv1d`, whose arguments have been checked; the weight may also be of the dtype that is computed in."""
    width = weight.shape[1] - 1
    with_initial = initial_state is not None and width > 0
    form = make_form(backend, layout, width, with_initial, x, activation is not None)
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
    final_state = state_of_last(final_tokens(x, initial_state, layout, width, joins=y.requires_grad), layout)
    return Together.apply(y, final_state) if layout.num_ranks > 1 else (y, final_state)


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
        return layout_of_one_device(x.shape[1])
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
            f"got {tuple(weight.shape)}.{hint or ' Pass one row of taps per channel'}"
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
    name: str,
    initial_state: Tensor | None,
    x: Tensor,
    width: tuple[int, ...],
    meaning: str,
    layout: SequenceLayout,
    width_name: str = "W-1",
) -> None:
    """Raise InputError unless the initial state of x ``[B, T, C]`` is None or of a shape ``[B or num_documents, *width, C]``."""
    if initial_state is None:
        return
    check_tensor(name, "initial_state", initial_state)
    rows, first = (layout.num_documents, "num_documents") if layout.has_document_states else (x.shape[0], "B")
    expected = (rows, *width, x.shape[2])
    fits = initial_state.dtype == x.dtype and initial_state.device == x.device
    if tuple(initial_state.shape) != expected or not fits:
        dims = ", ".join([first, *(width_name for _ in width), "C"])
        raise InputError(
            f"{name}: initial_state must be {meaning}, [{dims}] = {expected} in {x.dtype} on "
            f"{x.device}; got {tuple(initial_state.shape)} in {initial_state.dtype} on {initial_state.device}. Convert it with "
            "initial_state.to(x)"
        )


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
    tokens = x.index_select(1, plan.rows).to(accumulation_dtype(x.dtype) if x.is_floating_point() else x.dtype)
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
