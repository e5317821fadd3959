"""Point-to-point messages of one exchange of one rank, inside the work of `run_beside`.

On the CPU (gloo) every operation is launched when it is asked for. Receives should be asked for first: a send waits for its receive
to be posted before any payload travels. On CUDA (NCCL) operations of a communicator run one batch after another, so that a receive
posted early would hold up all sends behind it: operations are collected, and launched together by `flush`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longspan.comm.groups import kept
from longspan.comm.numbering import NUM_TAGS
from longspan.comm.traffic import note_collective

# How many exchanges a rank may be ahead of the rank that takes its messages, which bounds the memory of sends under way.
MAX_EXCHANGES_AHEAD = 4
# A tag has 31 bits.
_TAGS_OF_AN_EXCHANGE = 2**31 // NUM_TAGS


@dataclass
class Receipt:
    """A receive that has been asked for."""

    buffer: Tensor
    works: Sequence[Any] = ()


class Mailbox:
    """Sends and receives of one exchange.

    Args:
        group: carries messages only, of this mailbox's kind.
        device: where the tensors are.
        name, phase: as `note_collective` takes them.
        exchange: its `Step.tag`, part of each message's tag: messages of different exchanges do not meet.
    """

    def __init__(
        self, group: dist.ProcessGroup, device: torch.device, name: str, phase: str, exchange: int = 0
    ) -> None:
        self._group = group
        self.is_immediate = device.type == "cpu"
        self._name, self._phase = name, phase
        self._first_tag = exchange * _TAGS_OF_AN_EXCHANGE
        self._asked: list[tuple[dist.P2POp, Receipt | None]] = []
        # With the tensors, which are held until they are sent.
        self._sends: list[tuple[Sequence[Any], Tensor]] = []

    def receive(self, buffer: Tensor, source: int, tag: int) -> Receipt:
        """Ask for a message of rank `source` into the contiguous `buffer`; gloo matches messages of one tag in their order."""
        receipt = Receipt(buffer)
        self._ask(dist.P2POp(dist.irecv, buffer, group=self._group, group_peer=source, tag=self._tag(tag)), receipt)
        return receipt

    def send(self, x: Tensor, target: int, tag: int) -> None:
        """Ask for the contiguous `x` to be sent to rank `target`."""
        note_collective(self._name, self._phase, x.nbytes)
        self._ask(dist.P2POp(dist.isend, x, group=self._group, group_peer=target, tag=self._tag(tag)), None)

    def flush(self) -> None:
        """Launch what was asked for."""
        if not self._asked:
            return
        asked, self._asked = self._asked, []
        works = dist.batch_isend_irecv([operation for operation, _ in asked])
        for operation, receipt in asked:
            if receipt is None:
                self._sends.append((works, operation.tensor))
            else:
                receipt.works = works

    def wait(self, receipt: Receipt) -> Tensor:
        """The message, once it is here."""
        for work in receipt.works:
            work.wait()
        return receipt.buffer

    def close(self) -> None:
        """Launch what is left. Sends stay under way, and are waited for a few exchanges later."""
        self.flush()
        under_way: deque[list[tuple[Sequence[Any], Tensor]]] = kept(self._group, "sends", deque)
        under_way.append(self._sends)
        while len(under_way) > MAX_EXCHANGES_AHEAD:
            for works, _ in under_way.popleft():
                for work in works:
                    work.wait()

    def _ask(self, operation: dist.P2POp, receipt: Receipt | None) -> None:
        self._asked.append((operation, receipt))
        if self.is_immediate:
            self.flush()

    def _tag(self, tag: int) -> int:
        # NCCL has no tags: it matches messages between two ranks in their order.
        return self._first_tag + tag % _TAGS_OF_AN_EXCHANGE if self.is_immediate else 0
