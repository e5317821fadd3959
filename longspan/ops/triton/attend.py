"""The kernel that reads: one causal pass over every stretch, which gives outputs and all gradients.

Shapes: B batch rows, T tokens, H heads, N stretches of chunks of C tokens. With a in the place of queries, b of
keys, c of values, and Z the state that enters the stretch (``b cᵀ`` summed over all that came before):

    out_t = scale_out · [ e^{x_t} Zᵀ a_t + scale_in · Σ_{s ≤ t} e^{x_t − x_s} (a_t · b_s) c_s ]
    Z ← e^{b_C} Z + scale_in · Σ_s e^{b_C − x_s} b_s c_sᵀ

Linear attention and its gradients are this with other operands, the last two reversed in time (≤ becomes ≥; Lightning
Attention-2, arXiv 2401.04658, and GLA, arXiv 2312.06635, have them one by one):

    | out | a | b | c | Z |
    |---|---|---|---|---|
    | o | q | k | v | S |
    | ∂q | ∂o | v | k | Sᵀ |
    | ∂k | v | ∂o | q | ∂Sᵀ |
    | ∂v | k | q | ∂o | ∂S |

Where a decay belongs to a key channel, it belongs to what a and b are multiplied over for o and ∂v, and to the columns of out
for ∂q and ∂k (AXIS). Then no product of e^{x_t} and e^{−x_s} can be formed without a reference between the two, lest one
overflow: the chunk is halved again and again, and each square between a later and an earlier half takes the last token of the
earlier half for reference, so that no factor exceeds 1.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language import constexpr

from longspan.ops.triton.launch import configs
from longspan.ops.triton.log_decays import CHANNEL, HEAD, NONE, of_tokens
from longspan.ops.triton.product import product, product_with_state

CONTRACTED = constexpr(0)
COLUMNS = constexpr(1)


@triton.jit
def _load_rows(x, tokens, token_stride, columns, num_columns, is_token):
    """``[C, D]`` of a head's rows; zero where there is no token or no column."""
    mask = is_token[:, None] & (columns < num_columns)[None, :]
    return tl.load(x + tokens[:, None] * token_stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _square(places, half, REVERSE: tl.constexpr):
    """Which pairs (query, key) ``[C, C]`` lie in a square between a later and an earlier half of `half` tokens."""
    same = (places // (2 * half))[:, None] == (places // (2 * half))[None, :]
    later = places // half % 2 == 1
    if REVERSE:
        return same & ~later[:, None] & later[None, :]
    else:
        return same & later[:, None] & ~later[None, :]


@triton.jit
def _from_reference(g, g_token, start, b, places, half, columns, num_columns, num_valid):
    """e^{−|b_t − b_reference|} ``[C, D]``; the reference is the last token of the earlier half of t's square."""
    reference = places // (2 * half) * (2 * half) + half - 1
    tokens = (start + reference).to(tl.int64)
    at_reference = _load_rows(g, tokens, g_token, columns, num_columns, reference < num_valid)
    return tl.exp(-tl.abs(b - at_reference).to(tl.float32))


@triton.jit
def _is_finite(x):
    return tl.abs(x.to(tl.float32)) < float("inf")


@triton.jit
def _spoil(result, is_finite, REVERSE: tl.constexpr):
    """`result` ``[C, D]``, NaN from the first token of a column that is not finite on (reversed: up to the last).

    A token that is masked out still counts in a product, as 0 · NaN. So what is read is made finite before, and this follows.
    """
    if tl.max(tl.max(tl.where(is_finite, 0, 1), axis=1), axis=0) > 0:
        reached = tl.cumsum(tl.where(is_finite, 0.0, 1.0), axis=0, reverse=REVERSE)
        result = tl.where(reached > 0.0, float("nan"), result)
    return result


@triton.autotune(
    configs=configs((4, 2), (8, 2)),
    key=["num_contracted", "num_columns", "DECAY", "AXIS", "REVERSE", "INSIDE", "PRECISION"],
    cache_results=True,
)
@triton.jit
def attend_kernel(
    a,
    b,
    c,
    out,
    g,
    log_decay,
    states,
    arriving,
    carried,
    dotted,
    dots,
    other_states,
    of_end,
    table,
    scale_in,
    scale_out,
    num_tokens,
    num_heads,
    a_heads,
    b_heads,
    c_heads,
    dotted_heads,
    num_contracted,
    num_columns,
    a_batch,
    a_token,
    a_head,
    b_batch,
    b_token,
    b_head,
    c_batch,
    c_token,
    c_head,
    dotted_batch,
    dotted_token,
    dotted_head,
    g_batch,
    g_token,
    g_head,
    state_row,
    state_column,
    LOWEST: tl.constexpr,
    DECAY: tl.constexpr,
    AXIS: tl.constexpr,
    REVERSE: tl.constexpr,
    HAS_STATES: tl.constexpr,
    HAS_ARRIVING: tl.constexpr,
    HAS_DOTS: tl.constexpr,
    HAS_OTHER_STATES: tl.constexpr,
    INSIDE: tl.constexpr,
    LOADS_SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """One pass over a stretch.

    a, b ``[B, T, ·, K]``, c ``[B, T, ·, V]``, out ``[B, T, H, V]`` contiguous, K and V whatever is contracted and left. states
    ``[num_slots, B, H, ·, ·]`` with strides for rows (contracted) and columns: with a transposed state they are swapped.
    arriving ``[·, B, H, ·, ·]``: what enters the piece from elsewhere, reaching the slot times e^carried. INSIDE: whether
    tokens of the stretch read each other (without, only the state is read). dots ``[V blocks, B, T, H]``: Σ out ⊙ dotted over
    the block's columns, with dotted ``[B, T, ·, V]``, but for what a token reads of itself, which no gate decays; where decays
    belong to columns not summed, ``[B, T, H, V]``. of_end: Σ Z ⊙ Z', of the entering state and that of ``other_states``, laid out
    as states, in the same slot, ``[V blocks, N, B, H]``; where decays belong to columns summed over rows alone, ``[N, B, H, V]``.
    scale_in: a number, or, LOADS_SCALE, a pointer to one. Program (stretch, V block; batch and head).
    """
    column_blocks = tl.cdiv(num_columns, BV)
    stretch, block = tl.program_id(0) // column_blocks, tl.program_id(0) % column_blocks
    head_index = tl.program_id(1)
    batch, head = (head_index // num_heads).to(tl.int64), head_index % num_heads
    first, stop = tl.load(table + stretch * 5), tl.load(table + stretch * 5 + 1)
    slot = tl.load(table + stretch * 5 + 2) + (1 if REVERSE else 0)
    arriving_row = tl.load(table + stretch * 5 + (4 if REVERSE else 3))

    places = tl.arange(0, C)
    rows = tl.arange(0, BK)
    columns = block * BV + tl.arange(0, BV)
    a += batch * a_batch + (head // (num_heads // a_heads)) * a_head
    if INSIDE:
        b += batch * b_batch + (head // (num_heads // b_heads)) * b_head
        c += batch * c_batch + (head // (num_heads // c_heads)) * c_head
    if HAS_DOTS:
        dotted += batch * dotted_batch + (head // (num_heads // dotted_heads)) * dotted_head
    if LOADS_SCALE:
        scale = tl.load(scale_in)
    else:
        scale = scale_in
    constant = 0.0
    if DECAY == HEAD:
        constant = tl.maximum(tl.load(log_decay + head).to(tl.float32), LOWEST)
    elif DECAY != NONE:
        g += batch * g_batch + head * g_head

    state = tl.zeros([BK, BV], tl.float32)
    is_state = (rows < num_contracted)[:, None] & (columns < num_columns)[None, :]
    tile = rows[:, None] * state_row + columns[None, :] * state_column
    size = tl.cast(num_contracted, tl.int64) * num_columns
    place = slot.to(tl.int64) * tl.num_programs(1) + head_index
    if HAS_STATES:
        state += tl.load(states + place * size + tile, mask=is_state, other=0.0)
    if HAS_ARRIVING:
        if arriving_row >= 0:
            entering = tl.load(
                arriving + (arriving_row.to(tl.int64) * tl.num_programs(1) + head_index) * size + tile,
                mask=is_state,
                other=0.0,
            )
            if DECAY == CHANNEL:
                if AXIS == CONTRACTED:
                    log_carried = tl.load(
                        carried + place * num_contracted + rows, mask=rows < num_contracted, other=0.0
                    )
                    entering *= tl.exp(log_carried)[:, None]
                else:
                    log_carried = tl.load(
                        carried + place * num_columns + columns, mask=columns < num_columns, other=0.0
                    )
                    entering *= tl.exp(log_carried)[None, :]
            elif DECAY != NONE:
                entering *= tl.exp(tl.load(carried + place))
            state += entering
    if HAS_OTHER_STATES:
        products = state * tl.load(other_states + place * size + tile, mask=is_state, other=0.0)
        end_at = stretch.to(tl.int64) * tl.num_programs(1) + head_index
        if DECAY == CHANNEL:
            tl.store(of_end + end_at * num_columns + columns, tl.sum(products, axis=0), mask=columns < num_columns)
        else:
            num_stretches = tl.num_programs(0) // column_blocks
            end_at += block.to(tl.int64) * num_stretches * tl.num_programs(1)
            tl.store(of_end + end_at, tl.sum(tl.sum(products, axis=1), axis=0))

    num_chunks = tl.cdiv(stop - first, C)
    for step in range(num_chunks):
        start = first + (num_chunks - 1 - step if REVERSE else step) * C
        num_valid = tl.minimum(stop - start, C)
        tokens = (start + places).to(tl.int64)
        is_token = places < num_valid
        query = _load_rows(a, tokens, a_token, rows, num_contracted, is_token)
        if INSIDE:
            key = _load_rows(b, tokens, b_token, rows, num_contracted, is_token)
            value = _load_rows(c, tokens, c_token, columns, num_columns, is_token)
            is_finite = _is_finite(value)
            finite = tl.where(is_finite, value, 0.0).to(value.dtype)
        of_itself = tl.zeros([C], tl.float32)
        if DECAY == CHANNEL:
            channels = rows if AXIS == CONTRACTED else columns
            num_channels = num_contracted if AXIS == CONTRACTED else num_columns
            sums = _load_rows(g, tokens, g_token, channels, num_channels, is_token)
            total = tl.load(
                g + (start + num_valid - 1).to(tl.int64) * g_token + channels, mask=channels < num_channels, other=0.0
            )
            x = total[None, :] - sums if REVERSE else sums
            if AXIS == CONTRACTED:
                decayed = (query * tl.exp(x.to(tl.float32))).to(query.dtype)
                result = product_with_state(decayed, state, PRECISION)
                state *= tl.exp(total.to(tl.float32))[:, None]
            else:
                result = product_with_state(query, state, PRECISION) * tl.exp(x.to(tl.float32))
                state *= tl.exp(total.to(tl.float32))[None, :]
            if INSIDE:
                if AXIS == CONTRACTED:
                    own = tl.sum(query.to(tl.float32) * key.to(tl.float32), axis=1)
                    scores = tl.where(places[:, None] == places[None, :], own[:, None], 0.0)
                    for level in tl.range(LEVELS, num_stages=1):
                        half = C >> (level + 1)
                        factor = _from_reference(g, g_token, start, sums, places, half, rows, num_contracted, num_valid)
                        square = product(
                            (query * factor).to(query.dtype), tl.trans((key * factor).to(key.dtype)), PRECISION
                        )
                        scores += tl.where(_square(places, half, REVERSE), square, 0.0)
                    result += product((scores * scale).to(value.dtype), finite, PRECISION)
                    leaving = (key * tl.exp((total[None, :] - x).to(tl.float32)) * scale).to(key.dtype)
                    state += product(tl.trans(leaving), value, PRECISION)
                else:
                    scores = product(query, tl.trans(key), PRECISION) * scale
                    of_itself = tl.sum(tl.where(places[:, None] == places[None, :], scores, 0.0), axis=1)
                    for level in tl.range(LEVELS, num_stages=1):
                        half = C >> (level + 1)
                        factor = _from_reference(g, g_token, start, sums, places, half, columns, num_columns, num_valid)
                        square = tl.where(_square(places, half, REVERSE), scores, 0.0).to(value.dtype)
                        result += product(square, (finite * factor).to(value.dtype), PRECISION) * factor
                    leaving = (value * tl.exp((total[None, :] - x).to(tl.float32)) * scale).to(value.dtype)
                    state += product(tl.trans(key), leaving, PRECISION)
        else:
            result = product_with_state(query, state, PRECISION)
            if DECAY != NONE:
                x, rest, total, total_rest = of_tokens(
                    g, g_token, constant, start, num_valid, LOWEST, DECAY, REVERSE, C
                )
                result *= tl.exp(x + rest)[:, None]
                state *= tl.exp(total + total_rest)
            if INSIDE:
                scores = product(query, tl.trans(key), PRECISION) * scale
                factor = tl.full([C], 1.0, tl.float32) * scale
                if DECAY != NONE:
                    between = (x[:, None] - x[None, :]) + (rest[:, None] - rest[None, :])
                    scores *= tl.exp(tl.minimum(between, 0.0))
                    factor *= tl.exp((total - x) + (total_rest - rest))
                if REVERSE:
                    scores = tl.where(places[:, None] <= places[None, :], scores, 0.0)
                else:
                    scores = tl.where(places[:, None] >= places[None, :], scores, 0.0)
                if HAS_DOTS:
                    is_own = places[:, None] == places[None, :]
                    of_itself = tl.sum(tl.where(is_own, scores, 0.0), axis=1)
                    scores = tl.where(is_own, 0.0, scores)
                result += product(scores.to(value.dtype), finite, PRECISION)
                state += product(tl.trans(key), (value * factor[:, None]).to(value.dtype), PRECISION)
        if INSIDE:
            result = _spoil(result, is_finite, REVERSE)
        result *= scale_out
        if HAS_DOTS:
            beside = _load_rows(dotted, tokens, dotted_token, columns, num_columns, is_token).to(tl.float32)
            row = (batch * num_tokens + tokens) * num_heads + head
            if DECAY == CHANNEL:
                tl.store(
                    dots + row[:, None] * num_columns + columns[None, :],
                    result * beside,
                    mask=is_token[:, None] & (columns < num_columns)[None, :],
                )
            else:
                part = block.to(tl.int64) * (tl.num_programs(1) // num_heads) * num_tokens * num_heads
                tl.store(dots + part + row, tl.sum(result * beside, axis=1), mask=is_token)
        if INSIDE and (HAS_DOTS or (DECAY == CHANNEL and AXIS == COLUMNS)):
            result += (of_itself * scale_out)[:, None] * value.to(tl.float32)
        target = ((batch * num_tokens + tokens) * num_heads + head)[:, None] * num_columns + columns[None, :]
        tl.store(
            out + target, result.to(out.dtype.element_ty), mask=is_token[:, None] & (columns < num_columns)[None, :]
        )
