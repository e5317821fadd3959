"""Log decays inside a chunk, as the kernels look them up.

C tokens per chunk, the first `num_valid` of them there. b_t is the sum of log decays from the chunk's first token to t, itself
included. Forward in time a token sees e^{x_t} of what enters the chunk, x = b; reversed it sees e^{x_t} of what enters from behind,
x_t = b_C − b_t. Either way

    decay between t and s = e^{x_t − x_s},      what s adds to the state that leaves the chunk: e^{b_C − x_s}

A sum of strong decays has no digits left for what the weak ones between them add. So log decays of heads and tokens are summed in
two parts: whole multiples of 2⁻¹⁰, whose sums and differences are exact, and the rest, which is small. Sums of channels are
float64 for float32 inputs; with two bytes an input the digits of float32 are enough.

Kinds of decay (DECAY): none; one per head (constant); one per token and head; one per token and key channel.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language import constexpr

NONE = constexpr(0)
HEAD = constexpr(1)
TOKEN = constexpr(2)
CHANNEL = constexpr(3)


@triton.jit
def of_tokens(
    g,
    stride_g,
    log_decay,
    start,
    num_valid,
    LOWEST: tl.constexpr,
    DECAY: tl.constexpr,
    REVERSE: tl.constexpr,
    C: tl.constexpr,
):
    """(x ``[C]``, its rest, b_C, its rest) of a chunk whose first token is `start`, for decays of a head or of tokens.

    g: pointer to the head's log decays, stride_g from token to token; log_decay: the head's constant.
    """
    places = tl.arange(0, C)
    if DECAY == HEAD:
        coarse = tl.floor(log_decay * 1024.0) * (1.0 / 1024.0)
        count = tl.minimum(places + 1, num_valid).to(tl.float32)
        b, rest = count * coarse, count * (log_decay - coarse)
        total, total_rest = num_valid.to(tl.float32) * coarse, num_valid.to(tl.float32) * (log_decay - coarse)
    else:
        values = tl.load(g + (start + places).to(tl.int64) * stride_g, mask=places < num_valid, other=0.0)
        values = tl.maximum(values.to(tl.float32), LOWEST)
        coarse = tl.floor(values * 1024.0) * (1.0 / 1024.0)
        fine = values - coarse
        b, rest = tl.cumsum(coarse, axis=0), tl.cumsum(fine, axis=0)
        total, total_rest = tl.sum(coarse, axis=0), tl.sum(fine, axis=0)
    if REVERSE:
        return total - b, total_rest - rest, total, total_rest
    else:
        return b, rest, total, total_rest


@triton.jit
def cumulate_kernel(
    g,
    b,
    table,
    num_tokens,
    num_heads,
    num_channels,
    g_batch,
    g_token,
    g_head,
    LOWEST: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
):
    """b of every token for decays of channels: ``g [B, T, H, K]`` to ``b [B, T, H, K]`` in its own dtype, sums inside chunks of C.

    Program (stretch, channels; batch and head).
    """
    blocks = tl.cdiv(num_channels, BK)
    stretch, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    batch, head = (tl.program_id(1) // num_heads).to(tl.int64), tl.program_id(1) % num_heads
    first, stop = tl.load(table + stretch * 5), tl.load(table + stretch * 5 + 1)
    channels = block * BK + tl.arange(0, BK)
    places = tl.arange(0, C)
    for start in range(first, stop, C):
        tokens = (start + places).to(tl.int64)
        mask = (tokens < stop)[:, None] & (channels < num_channels)[None, :]
        source = g + batch * g_batch + head * g_head + tokens[:, None] * g_token + channels[None, :]
        values = tl.maximum(tl.load(source, mask=mask, other=0.0).to(tl.float32), LOWEST)
        target = b + ((batch * num_tokens + tokens[:, None]) * num_heads + head) * num_channels + channels[None, :]
        tl.store(target, tl.cumsum(values.to(b.dtype.element_ty), axis=0), mask=mask)
