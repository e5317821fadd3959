"""The kernels as functions of tensors. Nothing here is differentiated: `custom_operators` puts the passes together.

Shapes: B batch rows, T tokens, H heads of v and ∂o, H_k heads of q and k, K × V a state, N stretches;
`longspan.ops.triton.stretches` has the tables, `longspan.ops.triton.attend` the algebra.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.ops.triton import attend as attend_kernels
from longspan.ops.triton import gate_gradient as gate_kernels
from longspan.ops.triton import log_decays as kinds
from longspan.ops.triton import states as state_kernels
from longspan.ops.triton.launch import LOWEST_KERNEL_LOG_DECAY, Tuned, cdiv, power_of_2, precision, strides, tile_size

CONTRACTED, COLUMNS = attend_kernels.CONTRACTED.value, attend_kernels.COLUMNS.value
_WRITE, _ATTEND = Tuned(state_kernels.write_kernel), Tuned(attend_kernels.attend_kernel)


@dataclass(frozen=True)
class Decay:
    """Log decays as the kernels take them.

    kind: of `longspan.ops.triton.log_decays`. values: what is looked up at each token, ``[B, T, H]``, or for channels the sums
    ``[B, T, H, K]`` of `cumulate`; None for others. log_decay: ``[H]`` or None. chunk_size: C.
    """

    kind: int
    values: Tensor | None
    log_decay: Tensor | None
    chunk_size: int

    @classmethod
    def of(cls, g: Tensor | None, log_decay: Tensor | None, sums: Tensor | None, chunk_size: int) -> Decay:
        """g ``[B, T, H]`` or ``[B, T, H, K]``, with its `sums` for the second; or log_decay ``[H]``; or neither."""
        if g is None:
            kind = kinds.NONE if log_decay is None else kinds.HEAD
            return cls(kind.value, None, log_decay, chunk_size)
        if g.dim() == 3:
            return cls(kinds.TOKEN.value, g, None, chunk_size)
        return cls(kinds.CHANNEL.value, sums, None, chunk_size)

    @property
    def is_of_channels(self) -> bool:
        return self.kind == kinds.CHANNEL.value

    @property
    def is_none(self) -> bool:
        return self.kind == kinds.NONE.value

    def strides(self) -> tuple[int, int, int]:
        return (0, 0, 0) if self.values is None else strides(self.values)


def dtype_of_sums(dtype: torch.dtype) -> torch.dtype:
    """Of sums of log decays of channels, for inputs of `dtype`: what strong decays leave of float32's digits is bfloat16's."""
    return torch.float64 if dtype == torch.float32 else torch.float32


def cumulate(g: Tensor, table: Tensor, chunk_size: int, dtype: torch.dtype) -> Tensor:
    """Sums of log decays ``g [B, T, H, K]`` inside chunks, in `dtype`, contiguous."""
    batch, num_tokens, num_heads, size = g.shape
    sums = torch.empty(g.shape, dtype=dtype, device=g.device)
    block = min(64, tile_size(size))
    grid = (table.shape[0] * cdiv(size, block), batch * num_heads)
    if table.shape[0]:
        kinds.cumulate_kernel[grid](
            g,
            sums,
            table,
            num_tokens,
            num_heads,
            size,
            *strides(g),
            LOWEST=LOWEST_KERNEL_LOG_DECAY,
            C=chunk_size,
            BK=block,
        )
    return sums


def write_pass(
    left: Tensor,
    right: Tensor,
    decay: Decay,
    table: Tensor,
    num_slots: int,
    *,
    scale: float = 1.0,
    reverse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What every stretch writes, ``scale · Σ e^{..} left rightᵀ``, in the slot that it leaves (reversed: that it reads).

    left ``[B, T, ·, K]``, right ``[B, T, H, V]``. Returns float32 states ``[num_slots, B, H, K, V]``, of which the other slots
    are not written, and, forward in time, the log decays over the stretches ``[N, B, H]`` or ``[N, B, H, K]``, None where
    nothing decays.
    """
    batch, num_tokens, num_heads, value_size = right.shape
    key_size = left.shape[-1]
    states = torch.empty(num_slots, batch, num_heads, key_size, value_size, dtype=torch.float32, device=right.device)
    totals = None
    if not reverse and not decay.is_none:
        shape = (table.shape[0], batch, num_heads, *((key_size,) if decay.is_of_channels else ()))
        totals = states.new_empty(shape)
    row_block, column_block = min(64, tile_size(key_size)), min(64, tile_size(value_size))
    num_blocks = cdiv(key_size, row_block) * cdiv(value_size, column_block)
    if table.shape[0]:
        _WRITE.launch(
            (table.shape[0] * num_blocks, batch * num_heads),
            (
                left,
                right,
                decay.values,
                decay.log_decay,
                states,
                totals,
                table,
                scale,
                num_tokens,
                num_heads,
                left.shape[2],
                right.shape[2],
                key_size,
                value_size,
                *strides(left),
                *strides(right),
                *decay.strides(),
            ),
            LOWEST=LOWEST_KERNEL_LOG_DECAY,
            DECAY=decay.kind,
            REVERSE=reverse,
            PRECISION=precision(left.dtype),
            C=decay.chunk_size,
            BK=row_block,
            BV=column_block,
        )
    return states, totals


def scan(
    states: Tensor,
    totals: Tensor | None,
    pieces: Tensor,
    kind: int,
    *,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    reverse: bool = False,
) -> None:
    """Turn what stretches write into running states, in place; see `longspan.ops.triton.states.scan_kernel`."""
    _, batch, num_heads, key_size, value_size = states.shape
    row_block, column_block = min(32, tile_size(key_size)), min(32, tile_size(value_size))
    num_blocks = cdiv(key_size, row_block) * cdiv(value_size, column_block)
    if pieces.shape[0]:
        state_kernels.scan_kernel[(pieces.shape[0] * num_blocks, batch * num_heads)](
            states,
            totals,
            starts,
            ends,
            pieces,
            key_size,
            value_size,
            HAS_STARTS=starts is not None,
            HAS_ENDS=ends is not None,
            DECAY=kind,
            REVERSE=reverse,
            BK=row_block,
            BV=column_block,
        )


def carry(totals: Tensor, pieces: Tensor, *, reverse: bool = False) -> Tensor:
    """Log decay between each slot and the start (reversed: the end) of its piece: totals ``[N, ...]`` as ``[num_slots, ...]``."""
    num_slots = totals.shape[0] + pieces.shape[0]
    carried = totals.new_empty(num_slots, *totals.shape[1:])
    size = totals.shape[3] if totals.dim() == 4 else 1
    if pieces.shape[0]:
        state_kernels.carry_kernel[(pieces.shape[0], totals.shape[1] * totals.shape[2])](
            totals, carried, pieces, size, REVERSE=reverse, BK=power_of_2(size)
        )
    return carried


@dataclass(frozen=True)
class Entering:
    """The state that enters each stretch: states of slots ``[num_slots, B, H, K, V]``, and what arrives at pieces from elsewhere.

    arriving ``[·, B, H, K, V]``, carried as of `carry`. Each may be None. transposed: the pass contracts over V instead of K.
    """

    states: Tensor | None = None
    arriving: Tensor | None = None
    carried: Tensor | None = None
    transposed: bool = False


def _column_blocks(dtype: torch.dtype, num_columns: int) -> tuple[int, int]:
    """Columns of a program of a pass, and how many programs share the columns."""
    # A state of K × block numbers stays in registers, with float32 operands beside it.
    block = min(32 if dtype == torch.float32 else 64, tile_size(num_columns))
    return block, cdiv(num_columns, block)


def shape_of_dots(g: Tensor, x: Tensor) -> tuple[int, ...]:
    """Of the dots that `attend_pass` gives for x ``[B, T, ·, K]``."""
    return (1 if g.dim() == 4 else _column_blocks(x.dtype, x.shape[-1])[1], *g.shape)


@dataclass(frozen=True)
class Passed:
    """What a pass gives: out ``[B, T, H, V]``; dots and of_end, if asked for, as `gate_gradient_pass` takes them."""

    out: Tensor
    dots: Tensor | None
    of_end: Tensor | None


def attend_pass(
    a: Tensor,
    b: Tensor | None,
    c: Tensor | None,
    decay: Decay,
    entering: Entering,
    table: Tensor,
    *,
    num_heads: int,
    num_columns: int,
    axis: int,
    scale_in: Tensor | float = 1.0,
    scale_out: float = 1.0,
    reverse: bool = False,
    dotted: Tensor | None = None,
    other_states: Tensor | None = None,
) -> Passed:
    """One pass of `longspan.ops.triton.attend`; b and c None: only the entering state is read.

    a, b ``[B, T, ·, K]``, c ``[B, T, ·, V]``; out ``[B, T, H, V]`` in the dtype of a, V is `num_columns`. scale_in: a number, or a
    float32 scalar tensor. dotted ``[B, T, ·, V]``: also return Σ out ⊙ dotted but for what tokens read of themselves, float32, in
    parts ``[n, B, T, H]`` to be summed over n, or, for decays of channels, which must belong to the columns, ``[1, B, T, H, V]``.
    other_states ``[num_slots, B, H, ·, ·]``: also return the sum of its products with the entering states, if any enter,
    in parts ``[n, N, B, H]``, or by column ``[1, N, B, H, V]`` for decays of channels, which must belong to the columns.
    """
    batch, num_tokens, _, num_contracted = a.shape
    out = a.new_empty(batch, num_tokens, num_heads, num_columns)
    block, num_blocks = _column_blocks(a.dtype, num_columns)
    dots = None
    if dotted is not None:
        shape = (1, *out.shape) if decay.is_of_channels else (num_blocks, *out.shape[:3])
        dots = torch.empty(shape, dtype=torch.float32, device=a.device)
    of_end = None
    if other_states is not None and (entering.states is not None or entering.arriving is not None):
        parts, tail = (1, (num_columns,)) if decay.is_of_channels else (num_blocks, ())
        of_end = torch.empty(parts, table.shape[0], batch, num_heads, *tail, dtype=torch.float32, device=a.device)
    # A state's own columns lie side by side; transposed, its rows do.
    state_strides = (1, num_contracted) if entering.transposed else (num_columns, 1)
    inside = b is not None and c is not None
    b, c = (b, c) if b is not None and c is not None else (a, a)
    beside = a if dotted is None else dotted
    if table.shape[0]:
        _ATTEND.launch(
            (table.shape[0] * num_blocks, batch * num_heads),
            (
                a,
                b,
                c,
                out,
                decay.values,
                decay.log_decay,
                entering.states,
                entering.arriving,
                entering.carried,
                beside,
                dots,
                other_states,
                of_end,
                table,
                scale_in,
                scale_out,
                num_tokens,
                num_heads,
                a.shape[2],
                b.shape[2],
                c.shape[2],
                beside.shape[2],
                num_contracted,
                num_columns,
                *strides(a),
                *strides(b),
                *strides(c),
                *strides(beside),
                *decay.strides(),
                *state_strides,
            ),
            LOWEST=LOWEST_KERNEL_LOG_DECAY,
            DECAY=decay.kind,
            AXIS=axis,
            REVERSE=reverse,
            HAS_STATES=entering.states is not None,
            HAS_ARRIVING=entering.arriving is not None,
            HAS_DOTS=dots is not None,
            HAS_OTHER_STATES=of_end is not None,
            INSIDE=inside,
            LOADS_SCALE=isinstance(scale_in, Tensor),
            PRECISION=precision(a.dtype),
            C=decay.chunk_size,
            LEVELS=decay.chunk_size.bit_length() - 1,
            BK=tile_size(num_contracted),
            BV=block,
        )
    return Passed(out, dots, of_end)


def gate_gradient_pass(
    g: Tensor,
    table: Tensor,
    dots: Tensor,
    subtracted: Tensor | None,
    *,
    sign: float,
    of_end: Tensor | None,
    other_end: Tensor | None = None,
    chunk_size: int,
) -> Tensor:
    """∂g in the shape and dtype of g, from sign · (dots − subtracted), both as `Passed.dots`; see `ops/triton/gate_gradient.py`.

    of_end: in parts, ``[n, N, B, H]`` or ``[n, N, B, H, K]``. other_end: in one.
    """
    batch, num_tokens, num_heads = g.shape[:3]
    size = g.shape[3] if g.dim() == 4 else 1
    out = torch.empty(g.shape, dtype=g.dtype, device=g.device)
    block = min(64, power_of_2(size))
    if table.shape[0]:
        gate_kernels.gate_kernel[(table.shape[0] * cdiv(size, block), batch * num_heads)](
            dots,
            dots if subtracted is None else subtracted,
            of_end,
            other_end,
            g,
            out,
            table,
            sign,
            num_tokens,
            num_heads,
            size,
            dots.shape[0],
            0 if of_end is None else of_end.shape[0],
            *strides(g),
            LOWEST=LOWEST_KERNEL_LOG_DECAY,
            HAS_SUBTRACTED=subtracted is not None,
            HAS_END=of_end is not None,
            HAS_OTHER_END=other_end is not None,
            C=chunk_size,
            BK=block,
        )
    return out
