"""Mamba's selective scan on one device: a state that decays by a rate per channel and number, and by a step per token and channel.

    h_t = e^{Δ_t A} ⊙ h_{t-1} + (Δ_t u_t) B_tᵀ,      y_t = h_t C_t + D ⊙ u_t,      o_t = y_t ⊙ silu(z_t)

(arXiv 2312.00752, Algorithm 2; Δ = softplus(delta + delta_bias) where that is asked for.) Every product here is of one token, so
that nothing passes from one to another but the state, which is computed token by token: a chunk form as of `longspan.ops.decay`
would need a decay for every pair of tokens, channel and number of the state.

Shapes: B batch rows, T tokens of this rank, E channels in G groups, N numbers of a state per channel, L tokens of a chunk.
Inside, a state is ``[B, N, E]``: channels last, as tokens have them, so that products with what is the same for all channels or
all numbers run along contiguous memory. What is given and returned is ``[B, E, N]``.

| file | |
|---|---|
| `recurrent` | the definition |
| `plan` | chunks of tokens, and blocks of rows and channels, whose memory stays in a core's cache |
| `block` | the inputs and the working memory of a block; its scan forward and backward in time |
| `sums` | what a stretch leaves to the state behind it, and to the gradient of the one before it, without the states between |
| `passes` | all blocks and chunks: outputs, end states, gradients |
| `nodes` | the nodes of autograd: alone, or write and read around an exchange |

A pass holds e^{ΔA} and the states of one chunk of one block. For backward the inputs are kept and the states between chunks, N / L
numbers for each channel of a token; everything else is formed again.
"""
