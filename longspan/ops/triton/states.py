"""Kernels of states: what every stretch writes starting from zero, and the states between stretches.

Shapes: B batch rows, T tokens, H heads, K × V a state, N stretches, P pieces; `longspan.ops.triton.stretches` has the tables. All
states are float32 and contiguous.

Forward in time a stretch of keys k and values v writes ``U = Σ_s e^{b_end − b_s} k_s v_sᵀ``, b summed from its start. Reversed,
queries q and gradients ∂o write the gradient of the state that enters the stretch, ``G = scale · Σ_t e^{b_t} q_t ∂o_tᵀ``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longspan.ops.triton.launch import configs
from longspan.ops.triton.log_decays import CHANNEL, HEAD, NONE, of_tokens
from longspan.ops.triton.product import product


@triton.autotune(
    configs=configs((4, 3), (4, 2)),
    key=["num_rows", "num_columns", "DECAY", "REVERSE", "PRECISION"],
    cache_results=True,
)
@triton.jit
def write_kernel(
    left,
    right,
    g,
    log_decay,
    states,
    totals,
    table,
    scale,
    num_tokens,
    num_heads,
    left_heads,
    right_heads,
    num_rows,
    num_columns,
    left_batch,
    left_token,
    left_head,
    right_batch,
    right_token,
    right_head,
    g_batch,
    g_token,
    g_head,
    LOWEST: tl.constexpr,
    DECAY: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """``scale · Σ_s e^{..} left_s right_sᵀ`` of every stretch, to the slot it leaves (reversed: the slot it reads).

    left ``[B, T, H_left, K]``, right ``[B, T, H_right, V]``; g: for CHANNEL the sums b of `cumulate_kernel`. Forward it also
    writes the log decay over each stretch, totals ``[N, B, H]`` or ``[N, B, H, K]``. Program (stretch, K block, V block; batch
    and head).
    """
    row_blocks, column_blocks = tl.cdiv(num_rows, BK), tl.cdiv(num_columns, BV)
    block = tl.program_id(0) % (row_blocks * column_blocks)
    stretch = tl.program_id(0) // (row_blocks * column_blocks)
    head_index = tl.program_id(1)
    batch, head = (head_index // num_heads).to(tl.int64), head_index % num_heads
    first, stop = tl.load(table + stretch * 5), tl.load(table + stretch * 5 + 1)
    slot = tl.load(table + stretch * 5 + 2)

    places = tl.arange(0, C)
    rows = (block // column_blocks) * BK + tl.arange(0, BK)
    columns = (block % column_blocks) * BV + tl.arange(0, BV)
    left += batch * left_batch + (head // (num_heads // left_heads)) * left_head
    right += batch * right_batch + (head // (num_heads // right_heads)) * right_head
    constant = 0.0
    if DECAY == HEAD:
        constant = tl.maximum(tl.load(log_decay + head).to(tl.float32), LOWEST)
    elif DECAY != NONE:
        g += batch * g_batch + head * g_head

    state = tl.zeros([BK, BV], tl.float32)
    passed = tl.zeros([BK], tl.float32)
    num_chunks = tl.cdiv(stop - first, C)
    for step in range(num_chunks):
        start = first + (num_chunks - 1 - step if REVERSE else step) * C
        num_valid = tl.minimum(stop - start, C)
        tokens = (start + places).to(tl.int64)
        is_token = (places < num_valid)[:, None]
        x = tl.load(
            left + tokens[:, None] * left_token + rows[None, :], mask=is_token & (rows < num_rows)[None, :], other=0.0
        )
        y = tl.load(
            right + tokens[:, None] * right_token + columns[None, :],
            mask=is_token & (columns < num_columns)[None, :],
            other=0.0,
        )
        if DECAY == CHANNEL:
            b = tl.load(
                g + tokens[:, None] * g_token + rows[None, :], mask=is_token & (rows < num_rows)[None, :], other=0.0
            )
            total = tl.load(g + (start + num_valid - 1).to(tl.int64) * g_token + rows, mask=rows < num_rows, other=0.0)
            x = (x * tl.exp((b if REVERSE else total[None, :] - b).to(tl.float32)) * scale).to(x.dtype)
            state *= tl.exp(total.to(tl.float32))[:, None]
            passed += total.to(tl.float32)
        elif DECAY == NONE:
            x = (x.to(tl.float32) * scale).to(x.dtype)
        else:
            decay, rest, total, total_rest = of_tokens(
                g, g_token, constant, start, num_valid, LOWEST, DECAY, REVERSE, C
            )
            y = (y * (tl.exp((total - decay) + (total_rest - rest)) * scale)[:, None]).to(y.dtype)
            state *= tl.exp(total + total_rest)
            passed += total + total_rest
        state += product(tl.trans(x), y, PRECISION)

    inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    place = ((slot + (0 if REVERSE else 1)).to(tl.int64) * tl.num_programs(1) + head_index) * num_rows
    tl.store(states + (place + rows[:, None]) * num_columns + columns[None, :], state, mask=inside)
    if not REVERSE and DECAY != NONE:
        entry = stretch.to(tl.int64) * tl.num_programs(1) + head_index
        if DECAY == CHANNEL:
            if block % column_blocks == 0:
                tl.store(totals + entry * num_rows + rows, passed, mask=rows < num_rows)
        else:
            if block == 0:
                tl.store(totals + entry, tl.max(passed, axis=0))


@triton.jit
def scan_kernel(
    states,
    totals,
    starts,
    ends,
    pieces,
    num_rows,
    num_columns,
    HAS_STARTS: tl.constexpr,
    HAS_ENDS: tl.constexpr,
    DECAY: tl.constexpr,
    REVERSE: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """What stretches write becomes running states, in place: ``S_{i+1} = e^{total_i} S_i + U_{i+1}``, from zero or a start state.

    Reversed: ``D_i = e^{total_i} D_{i+1} + G_i``, from zero.

    starts ``[·, B, H, K, V]``: start states by row. ends ``[·, B, H, K, V]``: where to copy the state that leaves a piece, by
    its end row (reversed: the gradient of what enters it, by the segment that it continues). Program (piece, K block, V block;
    batch and head).
    """
    row_blocks, column_blocks = tl.cdiv(num_rows, BK), tl.cdiv(num_columns, BV)
    block = tl.program_id(0) % (row_blocks * column_blocks)
    entry = pieces + tl.program_id(0) // (row_blocks * column_blocks) * 6
    head_index, num_heads = tl.program_id(1), tl.num_programs(1)
    first, last, number = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    start_row, end_row = tl.load(entry + 3), tl.load(entry + (5 if REVERSE else 4))

    rows = (block // column_blocks) * BK + tl.arange(0, BK)
    columns = (block % column_blocks) * BV + tl.arange(0, BV)
    inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    tile = rows[:, None] * num_columns + columns[None, :]
    size = tl.cast(num_rows, tl.int64) * num_columns

    state = tl.zeros([BK, BV], tl.float32)
    if HAS_STARTS:
        if start_row >= 0:
            state = tl.load(starts + (start_row * num_heads + head_index) * size + tile, mask=inside, other=0.0)
    slot = last if REVERSE else first
    tl.store(states + (slot * num_heads + head_index) * size + tile, state, mask=inside)
    for step in range(last - first):
        # Stretch i of piece p reads slot i + p.
        read = last - 1 - step if REVERSE else first + step
        where = states + ((read if REVERSE else read + 1) * num_heads + head_index) * size + tile
        stretch = (read - number).to(tl.int64) * num_heads + head_index
        if DECAY == CHANNEL:
            total = tl.load(totals + stretch * num_rows + rows, mask=rows < num_rows, other=0.0)
            state *= tl.exp(total)[:, None]
        elif DECAY != NONE:
            state *= tl.exp(tl.load(totals + stretch))
        state += tl.load(where, mask=inside, other=0.0)
        tl.store(where, state, mask=inside)
    if HAS_ENDS:
        if end_row >= 0:
            tl.store(ends + (end_row * num_heads + head_index) * size + tile, state, mask=inside)


@triton.jit
def carry_kernel(totals, carried, pieces, num_channels, REVERSE: tl.constexpr, BK: tl.constexpr):
    """Log decay between every slot and the start (reversed: the end) of its piece, in ``carried [num_slots, B, H, K]``.

    totals ``[N, B, H, K]``, the log decay over each stretch; K is 1 for decays of heads. Program (piece; batch and head).
    """
    entry = pieces + tl.program_id(0) * 6
    head_index, num_heads = tl.program_id(1), tl.num_programs(1)
    first, last, number = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    channels = tl.arange(0, BK)
    is_channel = channels < num_channels
    passed = tl.zeros([BK], tl.float32)
    slot = last if REVERSE else first
    tl.store(carried + (slot.to(tl.int64) * num_heads + head_index) * num_channels + channels, passed, mask=is_channel)
    for step in range(last - first):
        read = last - 1 - step if REVERSE else first + step
        stretch = (read - number).to(tl.int64) * num_heads + head_index
        passed += tl.load(totals + stretch * num_channels + channels, mask=is_channel, other=0.0)
        slot = read if REVERSE else read + 1
        place = carried + (slot.to(tl.int64) * num_heads + head_index) * num_channels + channels
        tl.store(place, passed, mask=is_channel)
