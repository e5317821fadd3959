"""Softmax attention block by block in a few lines, to be read: one row, one head, nothing but the mathematics.

    o_t = Σ_{s ≤ t} e^{scale · q_t·k_s} v_s / Σ_{s ≤ t} e^{scale · q_t·k_s}

Ranks hold blocks of keys, and outputs of different blocks are merged by their log-sum-exp: that is all that `ring` and
`all_gather` need beside a block of attention. `longspan.ops.softmax` has it for grouped heads, windows and documents, by fused
kernels, with a backward of its own. Tests hold this listing equal to the definition and to the engine. Nothing calls it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def softmax_by_blocks(q: Tensor, k: Tensor, v: Tensor, scale: float, block_size: int) -> Tensor:
    """o ``[T, D]``; q, k, v ``[T, D]``, causal."""
    outputs = []
    for row, queries in enumerate(q.split(block_size)):
        out = torch.zeros_like(queries)
        lse = torch.full_like(queries[:, :1], -torch.inf)
        for column, (keys, values) in enumerate(zip(k.split(block_size), v.split(block_size), strict=True)):
            # Later blocks are not seen at all, earlier ones whole, and a token's own up to itself.
            if column > row:
                continue
            scores = scale * queries @ keys.T
            if column == row:
                scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)

            # Softmax over this block alone, and the logarithm of what it divided by.
            own_lse = scores.logsumexp(1, keepdim=True)
            own = (scores - own_lse).exp() @ values

            # Both outputs are averages: weigh each by its share of the sum over the keys of both.
            total = torch.logaddexp(lse, own_lse)
            out = (lse - total).exp() * out + (own_lse - total).exp() * own
            lse = total
        outputs.append(out)
    return torch.cat(outputs)
