"""Chunkwise linear attention with decay: the engine behind every variant whose transition is diagonal.

    S_t = e^{g_t} S_{t-1} + k_t v_tᵀ,      o_t = scale · S_tᵀ q_t

Shapes: B batch rows, T tokens of this rank, H heads of v, H_k heads of q and k (H a multiple of H_k), K key size, V value size,
N chunks of at most C tokens. b_t is the sum of g from the chunk's first token to t, itself included. Inside a chunk

    o_t = scale · [ e^{b_t} S_inᵀ q_t + Σ_{s ≤ t} e^{b_t − b_s} (q_t·k_s) v_s ]
    S_out = e^{b_C} S_in + Σ_s e^{b_C − b_s} k_s v_sᵀ

(Lightning Attention-2, arXiv 2401.04658; GLA, arXiv 2312.06635, section 4). `longspan.ops.decay.factors` turns the decays into
factors of q, k and the states, so that plain matrix products do the rest. g may differ from key channel to key channel: read b_t
as a diagonal matrix.

Three phases, each linear in what it passes on, so that autograd composes them in any order:

    write          (k, v, g, start states) -> the state between any two chunks, each piece starting from zero or its start state
    read (inter)   (q, g, states, incoming states) -> what the tokens read from before their chunk
    read (intra)   (q, k, v, g) -> what they read inside their chunk

Only inputs and the states between chunks are kept for backward; `longspan.ops.decay.gate_gradient` has the gradient of g.
"""

from longspan.ops.decay.form import DecayVariant

__all__ = ["DecayVariant"]
