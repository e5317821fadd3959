"""Chunkwise gated slot attention: a softmax over M memory slots between two readings of states that decay slot by slot.

    K̃_t = Diag(e^{g_t}) K̃_{t-1} + s_t k_tᵀ        Ṽ_t = Diag(e^{g_t}) Ṽ_{t-1} + s_t v_tᵀ
    p_t = softmax(scale · K̃_t q_t)                 o_t = Ṽ_tᵀ p_t

Shapes: as in `longspan.ops.decay`, where the state is ``[M, K + V]``, K̃ and Ṽ beside each other: M key channels that decay,
written with the keys s_t and the values (k_t, v_t). So both are written, sent and kept as the state of `gla` is, at once; and Ṽ is
read as there, with p for q. What is new is the first reading, ``K̃_t q_t`` where `gla` has ``S_tᵀ q_t``: the query meets the side
that does not decay, and what is read are the slots. Inside a chunk

    K̃_t q_t = e^{b_t} ⊙ (K̃_in q_t) + Σ_{s ≤ t} e^{b_t − b_s} ⊙ s_s (k_s·q_t)

the decays stand at what is summed and at the sum, and no score q·k has any (`longspan.ops.slots.scores`).

Gated slot attention, arXiv 2409.07146, which calls the two readings a two-pass GLA.
"""
