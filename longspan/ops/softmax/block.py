"""Softmax attention of one block of queries on one block of keys, with its log-sum-exp.

Shapes: B batch, Tq queries, Tk keys, H heads, H_kv key and value heads (H a multiple of H_kv), D head dimension, D_v of
values.

PyTorch's flash operators return the log-sum-exp that merging blocks needs and take it back in backward, but have no
public name: this is the only file that calls private operators. `flash_operator` says which of them runs a tensor:
the CPU's for every floating dtype, CUDA's for float16 and bfloat16 with a head dimension that is a multiple of 8 and at
most 256. Anything else runs `plain_forward` and `plain_backward`, written here with public operators, a chunk of
queries at a time.

The flash operators take one size of head. Where D and D_v differ, the narrower of the two is padded with zeros for them, block by
block: queries and keys, which leaves their scores as they are, or values, whose further outputs are dropped.

PyTorch's flash operators have no softcap: with one, the plain form runs whatever the device.

Backward of a block with the *merged* output and log-sum-exp of all its query's blocks is exact: with
P = exp(scale·q·kᵀ − lse) and delta = rowsum(do ⊙ o), the block's share is dv = Pᵀ·do, dS = P ⊙ (do·vᵀ − delta),
dq = scale·dS·k, dk = scale·dSᵀ·q, and only lse and o know about the other blocks. With a softcap c the scores are
s = c·tanh(scale·q·kᵀ / c), and dS is multiplied by its slope, 1 − (s / c)².
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.autocast import not_cast
from longspan.dtypes import at_least_float32

PLAIN_CHUNK = 128
"""Most queries at a time in the plain form: its scores are [B, H, PLAIN_CHUNK, Tk]."""

MOST_SCORES = 2**26
"""Most scores at a time in the plain form: fewer queries where there are more (256 MiB in float32)."""

MANY_KEYS = 4096
"""On a CPU, so many keys or more are first copied to where those of a head lie side by side."""

FEW_QUERIES = 64
"""So many queries or fewer, as in decoding, read keys where they are: a copy would take longer than all of their attention."""

SCHEMAS = {
    "_scaled_dot_product_flash_attention_for_cpu": (
        "(Tensor query, Tensor key, Tensor value, float dropout_p=0., bool is_causal=False, *, Tensor? attn_mask=None, "
        "float? scale=None) -> (Tensor output, Tensor logsumexp)"
    ),
    "_scaled_dot_product_flash_attention_for_cpu_backward": (
        "(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor logsumexp, float dropout_p, "
        "bool is_causal, *, Tensor? attn_mask=None, float? scale=None) "
        "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value)"
    ),
    "_scaled_dot_product_flash_attention": (
        "(Tensor query, Tensor key, Tensor value, float dropout_p=0., bool is_causal=False, "
        "bool return_debug_mask=False, *, float? scale=None) -> (Tensor output, Tensor logsumexp, "
        "Tensor cum_seq_q, Tensor cum_seq_k, SymInt max_q, "
        "SymInt max_k, Tensor rng_state, Tensor unused, Tensor debug_attn_mask)"
    ),
    "_scaled_dot_product_flash_attention_backward": (
        "(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor logsumexp, Tensor cum_seq_q, "
        "Tensor cum_seq_k, SymInt max_q, SymInt max_k, float dropout_p, bool is_causal, Tensor philox_seed, "
        "Tensor philox_offset, *, float? scale=None) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)"
    ),
}
"""The private operators called here, as PyTorch 2.13 declares them. A test compares them with the installed release."""

FlashOperator = Literal["cpu", "cuda", "plain"]


def flash_operator(q: Tensor) -> FlashOperator:
    """Which code runs a block of queries like `q`, [B, Tq, H, D]."""
    if q.device.type == "cpu" and hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"):
        return "cpu"
    if (
        q.device.type == "cuda"
        and torch.version.hip is None
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 256
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    ):
        return "cuda"
    return "plain"


def block_forward(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of a block of queries on a block of keys.

    Args:
        q: ``[B, Tq, H, D]``, Tq at least 1.
        k, v: ``[B, Tk, H_kv, D]`` and ``[B, Tk, H_kv, D_v]``, Tk at least 1, any strides.
        causal: query i sees keys 0 to i of the block; else all of them.
        scale: above zero: kernels mask scores before they scale them, and the others turn -inf into NaN or inf.
        softcap: above zero: bounds the scaled scores s to softcap · tanh(s / softcap), before the mask; None is no bound.

    Returns:
        out ``[B, Tq, H, D_v]`` in q's dtype, normalised over the block's keys, and the log-sum-exp of the scaled scores,
        ``[B, H, Tq]``, float32 (float64 for float64). Where all scores of a query are -inf, out is 0 and the log-sum-exp -inf.
    """
    if softcap is not None:
        return plain_forward(q, k, v, causal=causal, scale=scale, softcap=softcap)
    dim, value_dim = q.shape[3], v.shape[3]
    if dim != value_dim and flash_operator(padded := _padded(q, value_dim)) != "plain":
        out, lse = block_forward(padded, _padded(k, value_dim), _padded(v, dim), causal=causal, scale=scale)
        # A view would keep what is dropped, as long as the output lives.
        return out[..., :value_dim].contiguous(), lse
    operator = flash_operator(q)
    if operator == "plain":
        return plain_forward(q, k, v, causal=causal, scale=scale)
    queries, keys, values = (_rows(x).transpose(1, 2) for x in (q, k, v))
    if operator == "cuda":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(queries, keys, values, 0.0, causal, scale=scale)[
            :2
        ]
        # The log-sum-exp of no score is +inf there.
        return out.transpose(1, 2), lse.masked_fill(lse == math.inf, -math.inf)
    if queries.shape[2] > FEW_QUERIES:
        keys, values = _near(keys), _near(values)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        queries, keys, values, 0.0, causal, scale=scale
    )
    # The log-sum-exp of no score is 0 there, which another block would take for a key of score 0.
    zero = lse == 0
    if torch.compiler.is_compiling() or bool(zero.any()):
        sees_nothing = zero & (out == 0).all(-1) & (_first_scores(queries, keys) == -math.inf)
        if torch.compiler.is_compiling():
            lse = lse.masked_fill(sees_nothing, -math.inf)
        elif bool(sees_nothing.any()):
            # Keys after the first may have a log-sum-exp of 0, and values of 0.
            return plain_forward(q, k, v, causal=causal, scale=scale)
    return out.transpose(1, 2), lse


def block_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    causal: bool,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one block, given what its queries got from all of their blocks together.

    Args:
        grad_out, out: ``[B, Tq, H, D_v]``; `out` merged over all blocks of these queries.
        lse: ``[B, H, Tq]``, merged too, and passed through `finite_lse`.
        q, k, v, causal, scale, softcap: as in `block_forward`.

    Returns:
        dq ``[B, Tq, H, D]``, dk ``[B, Tk, H_kv, D]`` and dv ``[B, Tk, H_kv, D_v]``: this block's share, in q's dtype.
    """
    if softcap is not None:
        return plain_backward(grad_out, q, k, v, out, lse, causal=causal, scale=scale, softcap=softcap)
    dim, value_dim = q.shape[3], v.shape[3]
    if dim != value_dim and flash_operator(padded := _padded(q, value_dim)) != "plain":
        grad_out, v, out = (_padded(x, dim) for x in (grad_out, v, out))
        dq, dk, dv = block_backward(grad_out, padded, _padded(k, value_dim), v, out, lse, causal=causal, scale=scale)
        return dq[..., :dim], dk[..., :dim], dv[..., :value_dim]
    operator = flash_operator(q)
    if operator == "plain":
        return plain_backward(grad_out, q, k, v, out, lse, causal=causal, scale=scale)
    grad_out, q, k, v, out = (_rows(x).transpose(1, 2) for x in (grad_out, q, k, v, out))
    if operator == "cpu":
        k, v = _near(k), _near(v)
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, q, k, v, out, lse, 0.0, causal, scale=scale
        )
    else:
        # Without dropout the random state is not read, but it must be there.
        seed = torch.empty(2, dtype=torch.uint64, device=q.device)
        offset = torch.empty((), dtype=torch.uint64, device=q.device)
        grads = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            grad_out,
            q,
            k,
            v,
            out,
            lse.contiguous(),
            None,
            None,
            q.shape[2],
            k.shape[2],
            0.0,
            causal,
            seed,
            offset,
            scale=scale,
        )
    dq, dk, dv = (x.transpose(1, 2) for x in grads)
    return dq, dk, dv


def near_keys(x: Tensor) -> Tensor:
    """Keys or values ``[B, T, H_kv, D or D_v]`` laid out as `block_forward` and `block_backward` would else lay them each time."""
    return _near(x.transpose(1, 2)).transpose(1, 2) if flash_operator(x) == "cpu" else x


@not_cast
def plain_forward(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """`block_forward` with public operators."""
    groups = q.shape[2] // k.shape[2]
    keys, values = (at_least_float32(x).permute(0, 2, 3, 1) for x in (k, v))
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    lse = keys.new_empty((q.shape[0], q.shape[2], q.shape[1]))
    size = _chunk_size(q, k)
    for start in range(0, q.shape[1], size):
        chunk = slice(start, start + size)
        visible = min(start + size, k.shape[1]) if causal else k.shape[1]
        scores = _scaled_scores(_grouped(q[:, chunk], groups), keys[..., :visible], scale, softcap)
        if causal:
            _mask_later_keys(scores, start)
        chunk_lse = scores.logsumexp(-1)
        probabilities = (scores - finite_lse(chunk_lse).unsqueeze(-1)).exp()
        chunk_out = probabilities.flatten(2, 3) @ values[..., :visible].mT
        out[:, chunk] = _ungrouped(chunk_out.unflatten(2, (groups, -1)))
        lse[..., chunk] = chunk_lse.flatten(1, 2)
    return out, lse


@not_cast
def plain_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    causal: bool,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`block_backward` with public operators."""
    groups = q.shape[2] // k.shape[2]
    keys, values = (at_least_float32(x).permute(0, 2, 3, 1) for x in (k, v))
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk, dv = torch.zeros_like(keys.mT), torch.zeros_like(values.mT)
    size = _chunk_size(q, k)
    for start in range(0, q.shape[1], size):
        chunk = slice(start, start + size)
        visible = min(start + size, k.shape[1]) if causal else k.shape[1]
        queries, grads, outs = (_grouped(x[:, chunk], groups) for x in (q, grad_out, out))
        chunk_lse = lse[..., chunk].unflatten(1, (-1, groups)).unsqueeze(-1)
        scores = _scaled_scores(queries, keys[..., :visible], scale, softcap)
        # Before the mask, whose -inf has no slope.
        slope = None if softcap is None else 1.0 - (scores / softcap).square()
        if causal:
            _mask_later_keys(scores, start)
        probabilities = (scores - chunk_lse).exp().flatten(2, 3)
        delta = (grads * outs).sum(-1, keepdim=True).flatten(2, 3)
        flat_grads = grads.flatten(2, 3)
        dscores = probabilities * (flat_grads @ values[..., :visible] - delta) * scale
        if slope is not None:
            dscores = dscores * slope.flatten(2, 3)
        dq[:, chunk] = _ungrouped((dscores @ keys[..., :visible].mT).unflatten(2, (groups, -1)))
        dk[:, :, :visible] += dscores.mT @ queries.flatten(2, 3)
        dv[:, :, :visible] += probabilities.mT @ flat_grads
    return dq, dk.transpose(1, 2).to(k.dtype), dv.transpose(1, 2).to(v.dtype)


def finite_lse(lse: Tensor) -> Tensor:
    """`lse` with 0 for -inf, of queries all of whose scores are -inf: e^(score - lse) is then 0 as it should, and not NaN."""
    return lse.masked_fill(lse == -math.inf, 0.0)


def _first_scores(q: Tensor, k: Tensor) -> Tensor:
    """The score, up to its scale, of every query on the block's first key, which all see: [B, H, Tq] of [B, H, Tq, D]."""
    first = k[:, :, :1].repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return (at_least_float32(q) * first).sum(-1)


def _chunk_size(q: Tensor, k: Tensor) -> int:
    """Queries at a time of [B, Tq, H, D] on keys [B, Tk, H_kv, D] in the plain form."""
    return max(1, min(PLAIN_CHUNK, MOST_SCORES // (q.shape[0] * q.shape[2] * k.shape[1])))


def _scaled_scores(queries: Tensor, keys: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Scaled scores [B, H_kv, H / H_kv, Tq, Tk] of queries [B, H_kv, H / H_kv, Tq, D] on keys [B, H_kv, D, Tk]."""
    scores = (queries.flatten(2, 3) @ keys).mul_(scale).unflatten(2, queries.shape[2:4])
    return scores if softcap is None else scores.div_(softcap).tanh_().mul_(softcap)


def _mask_later_keys(scores: Tensor, start: int) -> None:
    """Make scores [..., Tq, Tk] of the queries from number `start` on -inf, in place, on keys with a larger number."""
    num_queries, num_keys = scores.shape[-2:]
    rows = torch.arange(start, start + num_queries, device=scores.device).unsqueeze(-1)
    scores.masked_fill_(torch.arange(num_keys, device=scores.device) > rows, -math.inf)


def _grouped(x: Tensor, groups: int) -> Tensor:
    """[B, T, H, D] as [B, H / groups, groups, T, D] in the dtype that sums are taken in."""
    return at_least_float32(x).transpose(1, 2).unflatten(1, (-1, groups))


def _ungrouped(x: Tensor) -> Tensor:
    """[B, H_kv, groups, T, D] as [B, T, H, D]."""
    return x.flatten(1, 2).transpose(1, 2)


def _padded(x: Tensor, size: int) -> Tensor:
    """`x` [B, T, H, D] with zeros behind its channels, so that there are `size` of them at least."""
    return x if x.shape[3] >= size else F.pad(x, (0, size - x.shape[3]))


def _near(x: Tensor) -> Tensor:
    """Many keys or values ``[B, H, T, D]`` with those of a head side by side, not H · D numbers apart: faster on a CPU."""
    return x if x.stride(2) == x.shape[3] or x.shape[2] < MANY_KEYS else x.contiguous()


def _rows(x: Tensor) -> Tensor:
    """`x` [B, T, H, D] with each head's row contiguous and rows that do not overlap, as the matrix products expect.

    An upstream gradient may be an expanded scalar. `clone`, since `contiguous` keeps the strides of dimensions of size
    one.
    """
    if x.stride(3) == 1 and x.stride(1) >= x.shape[3]:
        return x
    return x.clone(memory_format=torch.contiguous_format)
