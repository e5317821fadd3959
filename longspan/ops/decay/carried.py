"""What every chunk form of a diagonal transition does alike: transitions of runs of tokens, and states that leave documents."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from longspan.layout import Piece, SequenceLayout
from longspan.ops.decay.factors import LOWEST_LOG_DECAY
from longspan.ops.variants.variant import Gates
from longspan.state import HeadDecay, Transition
from longspan.tracing import has_no_values

Ranges = Sequence[tuple[int, int]]


def diagonal_transition(
    transition_type: type[Transition], gates: Gates, ranges: Ranges, state_dtype: torch.dtype, device: torch.device
) -> Transition:
    """The transitions of runs of local tokens ``[start, stop)``: from g ``[B, T, H, ...]``, or log_decay ``[H]``, or neither.

    device: of the states; that of log_decay may be the CPU.
    """
    g = gates.get("g")
    if g is not None:
        sums = [g[:, start:stop].sum(1, dtype=state_dtype) for start, stop in ranges]
        return transition_type(torch.stack(sums))
    lengths = torch.tensor([float(stop - start) for start, stop in ranges], dtype=state_dtype)
    log_decay = gates.get("log_decay")
    if log_decay is None:
        return transition_type(lengths * 0.0)
    assert issubclass(transition_type, HeadDecay)
    clamped = log_decay.to(state_dtype).clamp(min=LOWEST_LOG_DECAY)
    logs = lengths.to(log_decay.device, non_blocking=True)[:, None] * clamped
    return transition_type(logs.to(device, non_blocking=True), numbers_of_host(log_decay))


def numbers_of_host(log_decay: Tensor) -> tuple[float, ...] | None:
    """A constant's numbers where the host has them: of a tensor on the CPU."""
    return tuple(log_decay.tolist()) if log_decay.device.type == "cpu" and not has_no_values(log_decay) else None


def on_device(log_decay: Tensor, layout: SequenceLayout, device: torch.device) -> Tensor:
    """A constant ``[H]`` on `device`; of the host's numbers one copy is made for a layout, and the host never waits for it."""
    if log_decay.device == device:
        return log_decay
    numbers = numbers_of_host(log_decay)
    if numbers is None or torch.compiler.is_compiling():
        return log_decay.to(device, non_blocking=True)
    key = ("constant", numbers, log_decay.dtype, device)
    return layout.cached(key, lambda: log_decay.to(device, non_blocking=True))


def carried_final_states(
    own: Tensor, pieces: Sequence[Piece], incoming: Tensor | None, transition: Callable[[Ranges], Transition]
) -> Tensor:
    """The states that leave `pieces`, ``[len(pieces), B, H, K, V]``: those that start from zero (`own`), and what entered, decayed.

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
