"""The chunk form of a diagonal plus low-rank transition in a few lines, to be read: one row, one head, nothing but the mathematics.

    S_t = (Diag(e^{g_t}) + b_t a_tᵀ) S_{t-1} + k_t v_tᵀ,      o_t = scale · S_tᵀ q_t

The other modules of this folder compute the same in phases, with those of `longspan.ops.delta`. Tests hold this listing equal to
the recurrence and to the engine. Nothing calls it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def low_rank_by_chunks(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, a: Tensor, b: Tensor, state: Tensor, scale: float, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """o ``[T, V]`` and the state after the last token; q, k, g, a, b ``[T, K]``, v ``[T, V]``, state ``[K, V]``."""
    outputs = []
    for q_n, k_n, v_n, g_n, a_n, b_n in zip(*(x.split(chunk_size) for x in (q, k, v, g, a, b)), strict=True):
        # The decay from the chunk's start to token t, itself included, and to the token before, where a_t reads.
        total = g_n.cumsum(0)
        before = torch.cat([torch.zeros_like(total[:1]), total[:-1]])
        decay = (total[:, None] - total[None, :]).exp()
        to_before = (before[:, None] - total[None, :]).exp()

        # a_t reads w_t of the state before t, in which b_s w_s and k_s v_s of all s before t have been added to that of the chunk.
        lower = torch.einsum("tk, sk, tsk -> ts", a_n, b_n, to_before).tril(-1)
        through = torch.einsum("tk, sk, tsk -> ts", a_n, k_n, to_before).tril(-1)
        system = torch.eye(len(k_n), dtype=k_n.dtype) - lower
        known = through @ v_n + (a_n * before.exp()) @ state
        w = torch.linalg.solve_triangular(system, known, upper=False, unitriangular=True)

        # From here on it is linear attention with a decay, of two keys and values a token.
        outputs.append((q_n * total.exp()) @ state)
        state, to_end = total[-1].exp()[:, None] * state, (total[-1] - total).exp()
        for keys, values in ((b_n, w), (k_n, v_n)):
            outputs[-1] = outputs[-1] + torch.einsum("tk, sk, tsk -> ts", q_n, keys, decay).tril() @ values
            state = state + (keys * to_end).T @ values
    return scale * torch.cat(outputs), state
