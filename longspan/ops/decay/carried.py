"""What every chunk form of a diagonal transition does alike: transitions of runs of tokens, and states that leave documents."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from longspan.layout import Piece
from longspan.ops.decay.factors import LOWEST_LOG_DECAY
from longspan.ops.gates import LogDecays
from longspan.state import HeadDecay, Transition

Ranges = Sequence[tuple[int, int]]


def diagonal_transition(
    decays: LogDecays, ranges: Ranges, state_dtype: torch.dtype, device: torch.device
) -> Transition:
    """The transitions of runs of local tokens ``[start, stop)``; device: of the states."""
    transition = decays.kind.transition
    if decays.in_time is not None:
        sums = [decays.in_time[:, start:stop].sum(1, dtype=state_dtype) for start, stop in ranges]
        return transition(torch.stack(sums))
    log_decay = decays.constant
    if log_decay is None:
        return transition(torch.zeros(len(ranges), dtype=state_dtype, device=device))
    lengths = torch.tensor([float(stop - start) for start, stop in ranges], dtype=state_dtype)
    clamped = log_decay.to(state_dtype).clamp(min=LOWEST_LOG_DECAY)
    logs = lengths.to(log_decay.device, non_blocking=True)[:, None] * clamped
    return HeadDecay(logs.to(device, non_blocking=True), decays.numbers)


def carried_final_states(
    own: Tensor, pieces: Sequence[Piece], incoming: Tensor | None, transition: Callable[[Ranges], Transition]
) -> Tensor:
    """The states that leave `pieces`, ``[len(pieces), B, H, K, V]``: `own`, which started from zero, plus what entered, decayed.

    incoming: the state that enters each segment, ``[num_segments, B, H, K, V]``, or None.
    """
    if incoming is None:
        return own
    # No rows of what arrived: where no piece here takes anything from it, it is in the graph all the same. Its backward is a
    # collective of all ranks.
    carried = [incoming[:0]]
    for piece in pieces:
        state = incoming[piece.segment : piece.segment + 1]
        if piece.starts_document:
            carried.append(torch.zeros_like(state))
        else:
            carried.append(transition([(piece.start, piece.stop)]).apply(state))
    return own + torch.cat(carried)
