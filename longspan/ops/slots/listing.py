"""The chunk form of gated slot attention, to be read: one row and head in plain PyTorch, at any number of tokens per chunk.

    K̃_t = Diag(e^{g_t}) K̃_{t-1} + s_t k_tᵀ        Ṽ_t = Diag(e^{g_t}) Ṽ_{t-1} + s_t v_tᵀ
    p_t = softmax(scale · K̃_t q_t)                 o_t = Ṽ_tᵀ p_t

`longspan.ops.slots` computes the same without a decay for every pair, in blocks of chunks, with a backward of its own. Tests hold
this listing equal to the recurrence and to the engine. Nothing calls it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.ops.decay.listing import decay_by_chunks


def slots_by_chunks(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor, state: Tensor, scale: float, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """o ``[T, V]`` and the state after the last token.

    q, k ``[T, K]``, v ``[T, V]``, s, g ``[T, M]``, state ``[M, K + V]``: K̃ and Ṽ beside each other.
    """
    keys, values = state.split([k.shape[-1], v.shape[-1]], dim=-1)
    weights = []
    for q_n, k_n, s_n, g_n in zip(*(x.split(chunk_size) for x in (q, k, s, g)), strict=True):
        # b_t is the decay from the chunk's start to token t, itself included.
        b = g_n.cumsum(0)

        # What each slot of token t holds of an earlier token i of its chunk has decayed by b_t - b_i.
        scores = (q_n @ k_n.T).tril()
        inside = torch.einsum("ti, im, tim -> tm", scores, s_n, (b[:, None] - b[None, :]).exp())

        # What it holds of everything before the chunk has decayed by b_t.
        before = b.exp() * (q_n @ keys.T)
        weights.append(torch.softmax(scale * (inside + before), dim=-1))

        # What passes through the chunk decays by b_C, and what token i adds to its end by b_C - b_i.
        keys = b[-1].exp()[:, None] * keys + (s_n * (b[-1] - b).exp()).T @ k_n

    # The values are those of a decay, read with the weights of the slots.
    o, values = decay_by_chunks(torch.cat(weights), s, v, g, values, 1.0, chunk_size)
    return o, torch.cat([keys, values], dim=-1)
