"""An all-to-all of rows with parts of any size, started and waited for apart.

It also serves where only some ranks send to some others: all other parts are then empty. With single messages ranks would have
unequal numbers of operations; with an all-to-all they have one each (`longspan.exchange.halo` says why that matters).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist
from torch import Tensor

from longspan.comm.numbering import Step, launch
from longspan.comm.traffic import note_collective, waiting


@dataclass
class Flight:
    """A collective under way, and the memory it reads and writes."""

    work: Any
    received: Tensor
    sent: Tensor

    def wait(self) -> Tensor:
        """What arrived; the time spent counts as waiting for other ranks."""
        with waiting():
            self.work.wait()
        return self.received


def start_all_to_all(
    sent: Tensor,
    send_sizes: Sequence[int],
    receive_sizes: Sequence[int],
    group: dist.ProcessGroup,
    phase: str,
    name: str = "all_to_all",
) -> Flight:
    """Start an all-to-all that is an exchange of its own, with a number: see `longspan.comm.numbering.launch`.

    group: of two ranks or more. The other arguments and the result are those of `start_all_to_all_within`.
    """
    flights: list[Flight] = []

    def collective(channel: dist.ProcessGroup, step: Step) -> Any:
        flights.append(start_all_to_all_within(channel, group.rank(), sent, send_sizes, receive_sizes, phase, name))
        return flights[0].work

    work = launch(group, sent.device, name, phase, collective)
    return replace(flights[0], work=work)


def start_all_to_all_within(
    group: dist.ProcessGroup | None,
    rank: int,
    sent: Tensor,
    send_sizes: Sequence[int],
    receive_sizes: Sequence[int],
    phase: str,
    name: str = "all_to_all",
    header_bytes: int = 0,
) -> Flight:
    """Start an all-to-all inside the work of another exchange, on the process group of that work.

    Sends rows of `sent` ``[rows, ...]``, contiguous: as many to each rank, and from each, as the sizes say.

    Args:
        group: of the ranks; None is the default group.
        rank: this one's number in it. What it sends itself does not count as traffic.
        phase, name: as `note_collective` takes them.
        header_bytes: how many bytes of each row are a header, which does not count as traffic.

    Returns:
        The flight; what arrives ``[rows, ...]`` lies rank by rank.
    """
    received = sent.new_empty((sum(receive_sizes), *sent.shape[1:]))
    others = [size for other, size in enumerate(send_sizes) if other != rank]
    row_bytes = sent.element_size() * sent.shape[1:].numel() - header_bytes
    note_collective(name, phase, sum(others) * row_bytes, sum(size > 0 for size in others))
    work = dist.all_to_all_single(received, sent, list(receive_sizes), list(send_sizes), group=group, async_op=True)
    return Flight(work, received, sent)
