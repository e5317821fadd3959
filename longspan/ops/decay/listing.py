"""The chunk form of a decay in a few lines, to be read: one row, one head, nothing but the mathematics.

    S_t = Diag(e^{g_t}) S_{t-1} + k_t v_tᵀ,      o_t = scale · S_tᵀ q_t

`longspan.ops.decay` computes the same from factors instead of a decay for every pair, in blocks of chunks, with a
backward of its own. Tests hold this listing equal to the recurrence and to the engine. Nothing calls it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def decay_by_chunks(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, scale: float, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """o ``[T, V]`` and the state after the last token.

    q, k, g ``[T, K]`` (a decay per head is the same number in every channel), v ``[T, V]``, state ``[K, V]``.
    """
    outputs = []
    for q_n, k_n, v_n, g_n in zip(*(x.split(chunk_size) for x in (q, k, v, g)), strict=True):
        # b_t is the decay from the chunk's start to token t, itself included.
        b = g_n.cumsum(0)

        # What token t reads of an earlier token s of its chunk has decayed by b_t - b_s.
        scores = torch.einsum("tk, sk, tsk -> ts", q_n, k_n, (b[:, None] - b[None, :]).exp()).tril()
        inside = scores @ v_n

        # What it reads of everything before the chunk has decayed by b_t.
        before = (q_n * b.exp()) @ state
        outputs.append(scale * (inside + before))

        # What passes through the chunk decays by b_C, and what token s adds to its end by b_C - b_s.
        to_the_end = (b[-1] - b).exp()
        state = b[-1].exp()[:, None] * state + (k_n * to_the_end).T @ v_n
    return torch.cat(outputs), state
