"""Chunkwise delta rule with decay: the engine behind DeltaNet, Gated DeltaNet and KDA.

    S_t = (I − β_t k_t k_tᵀ) Diag(e^{g_t}) S_{t-1} + β_t k_t v_tᵀ,      o_t = scale · S_tᵀ q_t

Shapes: B batch rows, T tokens of this rank, H heads of v, H_k heads of q and k (H a multiple of H_k), K key size, V value size,
N chunks of at most C tokens. b_t is the sum of g from the chunk's first token to t, itself included; g is absent, one number per
token and head, or one per token and key channel. With k̂_t = e^{b_t} k_t, k̃_s = e^{−b_s} k_s and q̂_t = scale · e^{b_t} q_t, the
update that token t writes is u_t = β_t (v_t − Sᵀ k̂_t − Σ_{s<t} (k̂_t·k̃_s) u_s), S the state before the chunk, so that inside a
chunk (DeltaNet, arXiv 2406.06484)

    L = tril(β k̂ k̃ᵀ, −1)        T = (I + L)⁻¹        Ũ = T (β v)        W = T (β k̂)        u = Ũ − W S
    o = P u + q̂ S                P = tril(q̂ k̃ᵀ)
    S_out = e^{b_C} (S + k̃ᵀ u)   and, as a matrix, A = e^{b_C} (I − k̃ᵀ W)

(Gated DeltaNet, arXiv 2412.06464; KDA, arXiv 2510.26692). As in `longspan.ops.decay`, factors e^{b} are taken about the middle of
the chunk's range: e^{b−m}, where e^m is that module's r. Everything is computed in the dtype of the states: float32, for bfloat16
inputs as well.

The phases are autograd nodes, in this order:

    DeltaWrite     k, v, β, g  -> Ũ and W; what leaves the pieces that other ranks wait for, and the product of their A
      ... the exchange starts ...
    DeltaScores    q, k, g     -> P
      ... the exchange is waited for ...
    DeltaRun       Ũ, W, what entered each segment -> S before every chunk, and u
    DeltaRead      P, q, S, u  -> o

No A of a single chunk is ever formed: a state goes through a chunk as Ũ − W S and k̃ᵀ u, and so do the K columns of a piece's
product of A, where one is needed. Nor are gradients of W: with r = β (v − k̂ S) and u = T r, ∂r = Tᵀ ∂u holds all of them.
"""

from longspan.ops.delta.form import DeltaVariant

__all__ = ["DeltaVariant"]
