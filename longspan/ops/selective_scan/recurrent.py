"""The definition of the selective scan, token by token, in any floating dtype, for one document on one device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_scan_recurrent(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor,
) -> tuple[Tensor, Tensor]:
    """o ``[B, T, E]`` and the state after the last token ``[B, E, N]``.

    u, delta, z ``[B, T, E]``; A ``[E, N]``; B, C ``[B, T, G, N]``; D, delta_bias ``[E]``; initial_state ``[B, E, N]``.
    """
    steps = delta if delta_bias is None else delta + delta_bias
    steps = F.softplus(steps) if delta_softplus else steps
    # Channel e belongs to group e // (E / G).
    B, C = (x.repeat_interleave(u.shape[2] // x.shape[2], dim=2) for x in (B, C))
    state, outputs = initial_state, []
    for t in range(u.shape[1]):
        step = steps[:, t, :, None]
        state = (step * A).exp() * state + step * u[:, t, :, None] * B[:, t]
        outputs.append((state * C[:, t]).sum(-1))
    y = torch.stack(outputs, dim=1)
    y = y if D is None else y + D * u
    return (y if z is None else y * F.silu(z)), state
