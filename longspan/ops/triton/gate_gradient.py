"""The kernel of the gradient of log decays.

Shapes: B batch rows, T tokens, H heads, K key channels, N stretches. With y the share of e^{b_t} or e^{−b_t} of
token t in a gradient (q ⊙ ∂q, and −k ⊙ ∂k, without what a token reads of itself), the gradient of a log decay is the sum of y over
the rest of the stretch, plus the share of the decay over it in the state at its end; see `longspan.ops.decay.gate_gradient`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gate_kernel(
    sums,
    subtracted_sums,
    of_end,
    other_end,
    g,
    out,
    table,
    sign,
    num_tokens,
    num_heads,
    num_channels,
    num_sums,
    num_ends,
    g_batch,
    g_token,
    g_head,
    LOWEST: tl.constexpr,
    HAS_SUBTRACTED: tl.constexpr,
    HAS_END: tl.constexpr,
    HAS_OTHER_END: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
):
    """∂g of a stretch, zero where g lies below LOWEST.

    y = sign · (Σ sums − Σ subtracted_sums), float32 ``[num_sums, B, T, H]``, or ``[num_sums, B, T, H, K]`` for decays of channels.
    of_end: ``[num_ends, N, B, H]`` or ``[1, N, B, H, K]``; other_end: likewise, in one part. out ``[B, T, H]`` or
    ``[B, T, H, K]``, contiguous.
    Program (stretch, channels; batch and head).
    """
    channel_blocks = tl.cdiv(num_channels, BK)
    stretch, block = tl.program_id(0) // channel_blocks, tl.program_id(0) % channel_blocks
    head_index = tl.program_id(1)
    batch, head = (head_index // num_heads).to(tl.int64), head_index % num_heads
    first, stop = tl.load(table + stretch * 5), tl.load(table + stretch * 5 + 1)
    places, channels = tl.arange(0, C), block * BK + tl.arange(0, BK)
    is_channel = channels < num_channels
    g += batch * g_batch + head * g_head

    # Of all tokens behind the chunk, and of the stretch's end.
    later = tl.zeros([BK], tl.float32)
    entry = stretch.to(tl.int64) * tl.num_programs(1) + head_index
    if HAS_OTHER_END:
        later += tl.load(other_end + entry * num_channels + channels, mask=is_channel, other=0.0)
    if HAS_END:
        num_entries = (tl.num_programs(0) // channel_blocks).to(tl.int64) * tl.num_programs(1)
        for number in range(num_ends):
            part = of_end + (number * num_entries + entry) * num_channels + channels
            later += tl.load(part, mask=is_channel, other=0.0)
    num_chunks = tl.cdiv(stop - first, C)
    for step in range(num_chunks):
        start = first + (num_chunks - 1 - step) * C
        tokens = (start + places).to(tl.int64)
        mask = (tokens < stop)[:, None] & is_channel[None, :]
        row = ((batch * num_tokens + tokens) * num_heads + head)[:, None] * num_channels + channels[None, :]
        y = tl.zeros([C, BK], tl.float32)
        size = (tl.num_programs(1) // num_heads).to(tl.int64) * num_tokens * num_heads * num_channels
        for number in range(num_sums):
            y += tl.load(sums + number * size + row, mask=mask, other=0.0)
            if HAS_SUBTRACTED:
                y -= tl.load(subtracted_sums + number * size + row, mask=mask, other=0.0)
        y *= sign
        # What lies behind goes in with the chunk's last token, which it nearly cancels where a decay is strong: so every partial
        # sum is of the size of a result, and what rounds off is, too.
        last = tl.minimum(start + C, stop) - 1
        y += tl.where((tokens == last)[:, None], later[None, :], 0.0)
        # The sum over the rest of the chunk, token t itself included.
        result = tl.cumsum(y, axis=0, reverse=True)
        later = tl.sum(tl.where((places == 0)[:, None], result, 0.0), axis=0)
        values = tl.load(g + tokens[:, None] * g_token + channels[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(out + row, tl.where(values < LOWEST, 0.0, result).to(out.dtype.element_ty), mask=mask)
