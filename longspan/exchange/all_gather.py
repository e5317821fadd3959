"""LASP-2 (arXiv 2502.07563, Algorithms 2 and 4): one AllGather of (A, U), after which every rank folds its own prefix.

Backward is one AllGather of the gradients G, folded from the last segment on with the transitions that forward kept. A rank
sends (P − 1) · n · (|A| + |U|) numbers forward and (P − 1) · n · |U| backward, n segments a rank, whatever the sequence length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longspan.collectives import all_gather_single
from longspan.exchange.base import Arrived, Handle, ReverseHandle, Topology
from longspan.exchange.traffic import note_collective, waiting
from longspan.layout import SequenceLayout
from longspan.state import Pair, Transition, exclusive_scan, exclusive_scan_adjoint


def _global_order(layout: SequenceLayout, device: torch.device) -> Tensor:
    """For each segment in global order, its row in the gathered ``[P · num_segments, ...]``."""
    rows = [segment.rank * layout.num_segments + segment.slot for segment in layout.all_segments]
    order: Tensor = layout.cached(("segment_rows", device), lambda: torch.tensor(rows).to(device))
    return order


def _own_segments(layout: SequenceLayout) -> list[int]:
    """Global numbers of this rank's segments, in local order."""
    own = [(segment.slot, index) for index, segment in enumerate(layout.all_segments) if segment.rank == layout.rank]
    return [index for _, index in sorted(own)]


def _gather(local: Tensor, layout: SequenceLayout, phase: str) -> tuple[Tensor, Any]:
    """Start gathering ``local [num_segments, numbers]`` of every rank; returns the buffer and the work."""
    out = local.new_empty(layout.num_ranks * local.shape[0], local.shape[1])
    note_collective("all_gather", phase, (layout.num_ranks - 1) * local.numel() * local.element_size())
    return out, all_gather_single(out, local, layout.group, async_op=True)


@dataclass
class _Forward(Handle):
    gathered: Tensor
    work: Any
    pair: Pair
    layout: SequenceLayout

    def wait(self) -> Arrived:
        with waiting():
            self.work.wait()
        layout, transition, state = self.layout, self.pair.transition, self.pair.state
        numbers = self.gathered[_global_order(layout, state.device)]
        own = _own_segments(layout)
        num_segments = len(layout.all_segments)
        state_numbers = state[0].numel()
        states = numbers[:, :state_numbers].view(num_segments, *state.shape[1:])
        if transition.is_known:
            parameter = transition.parameter
        else:
            # A copy, or the whole buffer with every rank's states would live until backward.
            parameter = numbers[:, state_numbers:].reshape(num_segments, *transition.parameter.shape[1:]).clone()
        needed = max(own) + 1
        prefix = exclusive_scan(Pair(type(transition)(parameter[:needed]), states[:needed]))
        return Arrived(prefix[own], parameter)


@dataclass
class _Reverse(ReverseHandle):
    gathered: Tensor
    work: Any
    transition: Transition
    layout: SequenceLayout
    state_shape: torch.Size

    def wait(self) -> Tensor:
        with waiting():
            self.work.wait()
        own = _own_segments(self.layout)
        first = min(own)
        grads = self.gathered[_global_order(self.layout, self.gathered.device)].view(-1, *self.state_shape[1:])
        kind = type(self.transition)
        outgoing = exclusive_scan_adjoint(kind(self.transition.parameter[first:]), grads[first:])
        return outgoing[[index - first for index in own]]


class AllGather(Topology):
    """LASP-2's exchange: the default; best for few ranks and small states."""

    name = "all_gather"

    def start(self, pair: Pair, layout: SequenceLayout) -> Handle:
        parts = [pair.state.flatten(1)]
        if not pair.transition.is_known:
            parts.append(pair.transition.parameter.flatten(1))
        gathered, work = _gather(torch.cat(parts, dim=1), layout, "forward")
        return _Forward(gathered, work, pair, layout)

    def start_reverse(
        self, kind: type[Transition], context: Tensor, grad_incoming: Tensor, layout: SequenceLayout
    ) -> ReverseHandle:
        gathered, work = _gather(grad_incoming.flatten(1).contiguous(), layout, "backward")
        return _Reverse(gathered, work, kind(context), layout, grad_incoming.shape)
