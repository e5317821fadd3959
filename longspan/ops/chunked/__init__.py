"""What is computed a chunk of tokens at a time, so that nothing as wide as a vocabulary is held of all tokens.

The memory savers of the Mini-Sequence Transformer (arXiv 2407.15892): the loss (`cross_entropy`, and its node of autograd,
`loss_node`; that of each token for evaluation, `scores`) and the feed-forward layer (`swiglu`). Gradients of weights are sums over
chunks, in float32 at least (`sums`).
"""
