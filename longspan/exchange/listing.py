"""The exchange of states in a few lines, to be read: one row, one head, and the ranks as places in a list.

To a memory state the tokens of rank r do ``S_out = A_r · S_in + U_r``. The exchange gives every rank its S_in; backward it gives
every rank λ_r, the gradient of its S_out, from G_r, the gradients of the S_in. One collective each way, whatever the length.

`longspan.exchange` does this with messages, for every form of A, overlapped with other work. Tests hold this listing equal to
autograd through the recurrence and to the engine. Nothing calls it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def entering_states(a: Sequence[Tensor], u: Sequence[Tensor]) -> list[Tensor]:
    """S_in of every rank, as LASP-2 finds it; a ``[K, K]``, u ``[K, V]`` of each rank."""
    # AllGather: every rank has every pair (A, U). Each folds those before it; nobody waits for anybody's fold.
    entering = []
    for rank in range(len(u)):
        state = torch.zeros_like(u[0])
        for earlier in range(rank):
            state = a[earlier] @ state + u[earlier]
        entering.append(state)
    return entering


def entering_states_by_ring(a: Sequence[Tensor], u: Sequence[Tensor]) -> list[Tensor]:
    """The same as LASP finds it: the running state passes from rank to rank, and only it is sent."""
    entering = [torch.zeros_like(u[0])]
    for rank in range(len(u) - 1):
        leaving = a[rank] @ entering[rank] + u[rank]
        entering.append(leaving)
    return entering


def gradients_of_leaving_states(a: Sequence[Tensor], grad_in: Sequence[Tensor]) -> list[Tensor]:
    """λ of every rank, which is also ∂U; ∂A = λ S_inᵀ. grad_in: G ``[K, V]`` of each rank.

    The state that leaves rank r is the one that enters rank r + 1, so λ_r = G_{r+1} + A_{r+1}ᵀ λ_{r+1}: the same exchange from the
    last rank to the first, with Aᵀ for A and G for U.
    """
    reverse = entering_states([x.T for x in reversed(a)], list(reversed(grad_in)))
    return list(reversed(reverse))
