"""Chunkwise delta rule with a diagonal plus low-rank transition: the engine behind RWKV-7 and Comba.

    S_t = (Diag(e^{g_t}) + b_t a_tᵀ) S_{t-1} + k_t v_tᵀ,      o_t = scale · S_tᵀ q_t

Shapes: as in `longspan.ops.delta`, whose engine this is but for the write phase. The token's first key b_t writes what a_t reads of
the state before it, w_t = S_{t-1}ᵀ a_t, and its second key k_t writes v_t: two rows per token, of which the first decays. With
b̂_t the sum of g up to t (`longspan.ops.delta` calls it b_t), ã and k̃ the keys times e^{−b̂}, and α_t = e^{b̂_{t-1}} a_t, the reads
of a chunk are a triangular system (RWKV-7, arXiv 2503.14456; the form is that of WY representations, arXiv 2406.06484)

    L = tril(α b̃ᵀ, −1)        M = tril(α k̃ᵀ, −1)        T = (I − L)⁻¹        w = T (M v + α S)

so that rows (w, v) are Ũ − W S with Ũ = (T M v, v) and W = (−T α, 0), which is all that the chain, the scores of queries and the
output need. a_t reads before the token's decay: it is a query of the token before. A decay to nothing therefore takes what was
there but for what b_t writes of it, and no inverse of a decay is ever formed.
"""
