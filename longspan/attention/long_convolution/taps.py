"""A long convolution with taps over ranks: by the halo, or by channels.

Shapes: B batch rows, T tokens of this rank, S tokens of the sequence, C channels, K taps, D documents.

    halo           start halo (the K − 1 tokens before each segment) → all tokens, as if nothing stood before the rank's pieces →
                   wait → what the halo adds to the first K − 1 rows of each segment, in place
    all-to-all     start → the taps of this rank's channels, where a function makes them → wait → the whole sequence of these
                   channels → all-to-all back

The halo sends (K − 1) · B · C numbers for each segment, and the all-to-alls about 2 · T · B · C for each rank. On one rank there
is nothing to send, and they are the same.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.attention.convolution import before_heads, convolve_over_ranks, final_tokens
from longspan.attention.linear import profiled
from longspan.attention.long_convolution.by_channel import channels_of, start_to_channels, to_tokens
from longspan.attention.long_convolution.kernels import FunctionKernel, taps_for
from longspan.attention.one_state import state_of_last
from longspan.attention.together import Together
from longspan.dtypes import at_least_float32
from longspan.exchange.halo import halo_plan, start_halo
from longspan.first_order import first_order
from longspan.layout import SequenceLayout
from longspan.layout.calls import layout_of_one_device
from longspan.ops.convolution import Heads, kept_heads
from longspan.ops.long_convolution.fourier import ConvolveByFourier, fourier_groups
from longspan.tracing import unseen_by_checkpointing

Method = Literal["auto", "halo", "all_to_all"]
METHODS: tuple[Method, ...] = ("auto", "halo", "all_to_all")

MOST_DIRECT_TAPS = 32
"""Up to so many taps are multiplied one after another, as a short convolution's; transforms are faster with more."""
# Rows behind an initial state up to which sums are formed one by one: decoding has one.
_FEW_ROWS = 8


def chosen(method: Method, layout: SequenceLayout, num_taps: int) -> Method:
    """The method that is meant by ``"auto"``, the same on every rank: what sends fewer numbers."""
    if method != "auto":
        return method
    plan = halo_plan(layout, num_taps - 1) if num_taps > 1 else None
    by_halo = plan is None or not plan.exchanges or layout.num_segments * (num_taps - 1) <= max(layout.tokens_of)
    return "halo" if by_halo else "all_to_all"


@unseen_by_checkpointing
def convolve_taps(
    x: Tensor,
    kernel: Tensor | FunctionKernel,
    num_taps: int,
    initial_state: Tensor | None,
    layout: SequenceLayout,
    method: Method,
    output_final_state: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """`long_conv1d` with taps, whose arguments have been checked."""
    if layout.num_ranks > 1 and method == "all_to_all":
        y = _by_channels(x, kernel, num_taps, initial_state, layout)
    else:
        y = _by_halo(x, taps_for(kernel, range(x.shape[2]), num_taps, x), initial_state, layout)
    if not output_final_state:
        return y
    final_state = final_tokens(x, initial_state, layout, num_taps - 1, joins=y.requires_grad)
    final_state = state_of_last(final_state, layout)
    return Together.apply(y, final_state) if layout.num_ranks > 1 else (y, final_state)


def _by_channels(
    x: Tensor,
    kernel: Tensor | FunctionKernel,
    num_taps: int,
    initial_state: Tensor | None,
    layout: SequenceLayout,
) -> Tensor:
    learned = [p for p in (kernel, initial_state) if isinstance(p, Tensor) and p.requires_grad]
    pending = start_to_channels(x, layout, joins=torch.is_grad_enabled() and bool(learned))
    channels = channels_of(layout.rank, layout, x.shape[2])
    taps = taps_for(kernel, channels, num_taps, x)
    if initial_state is not None:
        initial_state = initial_state[..., channels.start : channels.stop]
    whole = layout.cached("all tokens", lambda: layout_of_one_device(layout.seq_len, layout.documents))
    return to_tokens(_by_fourier(pending.wait(), taps, initial_state, whole), x.shape[2], layout)


def _by_halo(x: Tensor, taps: Tensor, initial_state: Tensor | None, layout: SequenceLayout) -> Tensor:
    if taps.shape[1] > MOST_DIRECT_TAPS:
        return _by_fourier(x, taps, initial_state, layout)
    y = convolve_over_ranks(x, taps.flip(1), None, None, layout, initial_state, False, "torch")
    assert isinstance(y, Tensor)
    return y


def _by_fourier(x: Tensor, taps: Tensor, initial_state: Tensor | None, layout: SequenceLayout) -> Tensor:
    width = taps.shape[1] - 1
    with_initial = initial_state is not None and width > 0
    pending = None
    if width and not halo_plan(layout, width).is_empty:
        joins = torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in (taps, initial_state))
        pending = start_halo(x, layout, width, adds_in_place=True, joins=joins)
    groups = fourier_groups(layout, taps.shape[1])
    y: Tensor = ConvolveByFourier.apply(x if pending is None else pending.x, taps, groups)
    halo = None if pending is None else pending.wait()
    if halo is not None or with_initial:
        heads = kept_heads(layout, width, with_initial, x.device)
        before = before_heads(halo, initial_state if with_initial else None, heads, layout)
        with profiled("longspan.long_conv1d.heads", x):
            y = _AddRows.apply(y, _of_heads(before, taps, heads), heads.rows)
    return y


def _of_heads(before: Tensor, taps: Tensor, heads: Heads) -> Tensor:
    """What the tokens before the heads ``[heads, B, K-1, C]`` add to y of the head rows, ``[B, R, C]``, float32 or float64."""
    num_heads, batch, width, _ = before.shape
    before, taps = at_least_float32(before).flatten(0, 1), at_least_float32(taps)
    if 0 < heads.longest <= _FEW_ROWS:
        # Row o meets taps o + 1 to K − 1, the last of them the oldest token that is still seen.
        reversed_taps = taps.flip(1)
        added = torch.stack(
            [
                torch.einsum("bkc,ck->bc", before[:, offset:], reversed_taps[:, : width - offset])
                for offset in range(heads.longest)
            ],
            dim=1,
        )
    else:
        # The rows behind the heads, if those were zeros.
        two = layout_of_one_device(2 * width)
        padded = F.pad(before, (0, 0, 0, width))
        added = ConvolveByFourier.apply(padded, taps, fourier_groups(two, width + 1))[:, width:]
    return added.unflatten(0, (num_heads, batch))[heads.head, :, heads.offset].transpose(0, 1)


class _AddRows(torch.autograd.Function):
    """Add to some rows of a tensor in place.

    | | shape | |
    |---|---|---|
    | y | [B, T, C] | added to, and returned |
    | added | [B, R, C] | |
    | rows | [R] | no row twice |

    Backward: d(added) = dy at `rows`; dy is passed on.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, added: Tensor, rows: Tensor) -> Tensor:
        ctx.mark_dirty(y)
        ctx.save_for_backward(rows)
        ctx.dtype = added.dtype
        return y.index_add_(1, rows, added.to(y.dtype))

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (rows,) = ctx.saved_tensors
        return grad, grad.index_select(1, rows).to(ctx.dtype), None
