"""The chunk form of the delta rule in a few lines, to be read: one row, one head, nothing but the mathematics.

    S_t = (I − β_t k_t k_tᵀ) Diag(e^{g_t}) S_{t-1} + β_t k_t v_tᵀ,      o_t = scale · S_tᵀ q_t

The other modules of this folder compute the same in phases, from factors and an inverse that is kept, with a backward of their
own. Tests hold this listing equal to the recurrence and to the engine. Nothing calls it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def delta_rule_by_chunks(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, scale: float, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """o ``[T, V]`` and the state after the last token.

    q, k, g ``[T, K]`` (g is zero for `delta_rule`, and the same in every channel for `gated_delta_rule`), v ``[T, V]``, beta
    ``[T]``, state ``[K, V]``.
    """
    outputs = []
    for q_n, k_n, v_n, g_n, beta_n in zip(*(x.split(chunk_size) for x in (q, k, v, g, beta)), strict=True):
        # b_t is the decay from the chunk's start to token t, itself included; between s and t it is b_t - b_s.
        b = g_n.cumsum(0)
        decay = (b[:, None] - b[None, :]).exp()

        # Token t writes u_t = β_t (v_t - what its key reads): of the state before the chunk, and of u_s for all s before it.
        # That is a triangular system for all u of the chunk, (I + L) u = β (v - k̂ S).
        lower = (beta_n[:, None] * torch.einsum("tk, sk, tsk -> ts", k_n, k_n, decay)).tril(-1)
        system = torch.eye(len(k_n), dtype=k_n.dtype) + lower
        known = beta_n[:, None] * (v_n - (k_n * b.exp()) @ state)
        u = torch.linalg.solve_triangular(system, known, upper=False, unitriangular=True)

        # From here on it is linear attention with a decay, with u in the place of v.
        scores = torch.einsum("tk, sk, tsk -> ts", q_n, k_n, decay).tril()
        outputs.append(scale * (scores @ u + (q_n * b.exp()) @ state))
        state = b[-1].exp()[:, None] * state + (k_n * (b[-1] - b).exp()).T @ u
    return torch.cat(outputs), state
