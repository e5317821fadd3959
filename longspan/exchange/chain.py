"""The chain: a running state handed from segment to segment, from the first to the last, or backward from the last to the first.

Both directions do the same to what they carry. Forward a segment receives S_in and hands on ``A · S_in + U``; backward it receives
λ and hands on ``Aᵀ · λ + G``. Below, U and A stand for both.

Which messages there are follows from the layout, on every rank alike:

- A segment whose first token starts a document takes nothing from before: forward no message enters it, backward none leaves it.
- A segment in which a document starts is *cut*: what it hands on does not depend on what it receives, and is sent without waiting.
- Segments that follow each other on one rank (zigzag's last rank, where the chain turns) are a *run*, and need no message.

What is carried can be cut into blocks of value columns, which pass through the chain one behind the other (blocks of key rows would
not do: a matrix A mixes them). Block b passes run i at step i + b. Each rank does its steps in order, so that neither waiting
ranks nor, on NCCL, queued batches can wait for each other in a circle.

Shapes: n segments of this rank, B batch rows, H heads, K key size, V value size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from longspan.comm.background import Task, run_beside
from longspan.comm.numbering import current_step
from longspan.comm.point_to_point import Mailbox, Receipt
from longspan.exchange.codec import Codec
from longspan.exchange.segments import reorder_rows
from longspan.exchange.topology import Arrived, Carrier, Handle, ReverseHandle
from longspan.exchange.wire import Wire
from longspan.layout import SequenceLayout, group_of
from longspan.state import Form, Pair, Transition


@dataclass(frozen=True)
class ChainRun:
    """Segments that `rank` holds and that follow each other in the direction of travel.

    number: counts the runs of all ranks. rows: the segments' local numbers. cuts: for each, whether nothing of what enters it
    leaves it. source, target: ranks of the runs before and after it; None where nothing enters or leaves.
    """

    number: int
    rank: int
    rows: tuple[int, ...]
    cuts: tuple[bool, ...]
    source: int | None = None
    target: int | None = None

    @property
    def is_independent(self) -> bool:
        """Whether what leaves does not depend on what enters."""
        return self.source is None or any(self.cuts)


def chain_of(layout: SequenceLayout, reverse: bool, cuts: tuple[bool, ...] | None = None) -> tuple[ChainRun, ...]:
    """The runs of all ranks in the direction of travel.

    cuts: for each segment in global order; None: where a document starts.
    """
    return layout.cached(("chain", reverse, cuts), lambda: _chain(layout, reverse, cuts))


def _chain(layout: SequenceLayout, reverse: bool, cuts: Sequence[bool] | None) -> tuple[ChainRun, ...]:
    bounds = set(layout.document_bounds)
    numbered = list(enumerate(layout.all_segments))
    runs: list[ChainRun] = []
    previous = None
    for index, segment in reversed(numbered) if reverse else numbered:
        cut = segment.starts_document if cuts is None else cuts[index]
        later = previous if reverse else segment
        passes = previous is not None and later is not None and later.start not in bounds
        if passes and runs[-1].rank == segment.rank:
            last = runs[-1]
            runs[-1] = replace(last, rows=(*last.rows, segment.slot), cuts=(*last.cuts, cut))
        else:
            source = None
            if passes:
                source = runs[-1].rank
                runs[-1] = replace(runs[-1], target=segment.rank)
            runs.append(ChainRun(len(runs), segment.rank, (segment.slot,), (cut,), source))
        previous = segment
    return tuple(runs)


@dataclass(frozen=True)
class Chain(Carrier):
    """The chain, with the options of the topologies that use it.

    name: of the topology, for the count of messages. num_blocks: of value columns. state_dtype: states are rounded to it for the
    wire; None sends them as they are. cuts: as `chain_of` takes them. codec: what states are coded by, in place of state_dtype, and
    codec_inside between ranks of a node of `ranks_per_node`; None is none. codec_to: what they are coded by from and to the ranks
    before and after this one, in place of both.
    """

    name: str
    state_dtype: torch.dtype | None = None
    num_blocks: int = 1
    cuts: tuple[bool, ...] | None = None
    codec: Codec | None = None
    codec_inside: Codec | None = None
    ranks_per_node: int = 1
    codec_to: tuple[tuple[int, Codec | None], ...] = ()

    def start(self, pair: Pair, layout: SequenceLayout) -> Handle:
        parameter = pair.transition.parameter
        if pair.transition.is_known:
            parameter = reorder_rows(parameter, layout.own_segments, layout)
        transition = pair.transition.form(parameter)
        return _ForwardPassage(_launch(self, pair.state, transition, layout, "forward"), parameter)

    def start_reverse(
        self, kind: Form, context: tuple[Tensor, ...], grad_incoming: Tensor, layout: SequenceLayout
    ) -> ReverseHandle:
        return _ReversePassage(_launch(self, grad_incoming, kind(*context).adjoint(), layout, "backward"))


@dataclass
class _Carried:
    """What enters this rank's segments ``[n, B, H, K, V]``, under way."""

    like: Tensor
    task: Task[Tensor] | None

    def wait(self) -> Tensor:
        return torch.zeros_like(self.like) if self.task is None else self.task.wait()


@dataclass
class _ForwardPassage(Handle):
    carried: _Carried
    parameter: Tensor

    def wait(self) -> Arrived:
        return Arrived(self.carried.wait(), (self.parameter,))


@dataclass
class _ReversePassage(ReverseHandle):
    carried: _Carried

    def wait(self) -> Tensor:
        return self.carried.wait()


def _launch(chain: Chain, states: Tensor, transition: Transition, layout: SequenceLayout, phase: str) -> _Carried:
    runs = chain_of(layout, phase == "backward", chain.cuts)
    own = [run for run in runs if run.rank == layout.rank]
    if all(run.source is None and len(run.rows) == 1 for run in runs):
        return _Carried(states, None)
    on_cpu = states.device.type == "cpu"

    def work(group: dist.ProcessGroup) -> Tensor:
        mailbox = Mailbox(group, states.device, chain.name, phase, current_step().tag)
        passage = Passage(chain, states, transition, mailbox, layout.rank, phase)
        return passage.carry(own, order_of(runs, layout, in_batches=not on_cpu))

    task = run_beside(group_of(layout), states.device, work, "messages", name=chain.name, phase=phase)
    # Who receives nothing need not wait until its messages have left; if they fail, so does the next exchange. On CUDA, waiting
    # holds up nothing, and keeps the memory of what is sent.
    receives = any(run.source is not None or len(run.rows) > 1 for run in own)
    return _Carried(states, task if receives or not on_cpu else None)


@dataclass(frozen=True)
class MessageOrder:
    """In which order a rank asks for its messages.

    ahead: numbers of independent runs whose states are sent first. all_at_once: all receives are asked for before anything is sent.
    """

    ahead: frozenset[int]
    all_at_once: bool


def order_of(runs: Sequence[ChainRun], layout: SequenceLayout, in_batches: bool) -> MessageOrder:
    """The order for the runs of all ranks.

    in_batches: a rank's messages go in batches, and a batch begins when the one before it has been received (NCCL). A message that
    is asked for ahead of its step could then be queued before one that it waits for. That cannot happen where no message waits for
    another, or where the chain is a line of one segment per rank, in which all waiting goes one way.
    """
    all_at_once = not in_batches or all(run.is_independent or run.target is None for run in runs)
    may_send_ahead = all_at_once or layout.num_segments == 1
    return MessageOrder(frozenset(run.number for run in runs if run.is_independent and may_send_ahead), all_at_once)


class Passage:
    """One rank's part in one passage of the chain.

    states: U ``[n, B, H, K, V]`` and transition: A, of this rank's segments. rank: this one, whose node decides on the codec.
    """

    def __init__(
        self,
        chain: Chain,
        states: Tensor,
        transition: Transition,
        mailbox: Mailbox,
        rank: int = 0,
        phase: str = "forward",
    ) -> None:
        self._rank, self._ranks_per_node = rank, chain.ranks_per_node
        self._between = Wire(chain.state_dtype, chain.codec, phase, "between nodes")
        self._inside = Wire(chain.state_dtype, chain.codec_inside, phase, "inside a node")
        self._to = {other: Wire(None, codec, phase, f"to rank {other}") for other, codec in chain.codec_to}
        self._states, self._transition, self._mailbox = states, transition, mailbox
        self._incoming = states.new_zeros(states.shape)
        size = states.shape[-1]
        num_blocks = max(1, min(chain.num_blocks, size))
        edges = [size * block // num_blocks for block in range(num_blocks + 1)]
        self._blocks = [slice(start, stop) for start, stop in pairwise(edges)]

    def carry(self, runs: Sequence[ChainRun], order: MessageOrder) -> Tensor:
        """Take part with this rank's `runs`, in the direction of travel; returns what enters each segment."""
        mailbox, blocks = self._mailbox, range(len(self._blocks))
        by_number = {run.number: run for run in runs}
        steps = sorted((run.number + block, run.number, block) for run in runs for block in blocks)
        receipts: dict[tuple[int, int], Receipt] = {}
        if order.all_at_once:
            for _, number, block in steps:
                self._expect(by_number[number], block, receipts)
        for run in runs:
            for block in blocks if run.number in order.ahead else ():
                self._send(run, block, self._pass(run, block, None))
        for _, events in groupby(steps, key=lambda step: step[0]):
            now = [(by_number[number], block) for _, number, block in events]
            for run, block in now:
                self._expect(run, block, receipts)
            mailbox.flush()
            for run, block in now:
                if run.source is not None:
                    shape = self._states[0, ..., self._blocks[block]].shape
                    received = mailbox.wait(receipts[run.number, block])
                    entering = self._wire_to(run.source).unpack(received, shape, self._states.dtype)
                    leaving = self._pass(run, block, entering)
                elif run.number not in order.ahead:
                    leaving = self._pass(run, block, None)
                if run.number not in order.ahead:
                    self._send(run, block, leaving)
        mailbox.close()
        return self._incoming

    def _expect(self, run: ChainRun, block: int, receipts: dict[tuple[int, int], Receipt]) -> None:
        if run.source is None or (run.number, block) in receipts:
            return
        shape = self._states[0, ..., self._blocks[block]].shape
        buffer = self._wire_to(run.source).buffer(1, shape, self._states)
        receipts[run.number, block] = self._mailbox.receive(buffer, run.source, self._tag(run.number - 1, block))

    def _send(self, run: ChainRun, block: int, leaving: Tensor | None) -> None:
        if run.target is not None and leaving is not None:
            self._mailbox.send(self._wire_to(run.target).pack(leaving), run.target, self._tag(run.number, block))

    def _tag(self, link: int, block: int) -> int:
        return link * len(self._blocks) + block

    def _wire_to(self, other: int) -> Wire:
        """How states travel from or to another rank, the same on both sides."""
        if self._to:
            return self._to[other]
        size = self._ranks_per_node
        return self._inside if self._rank // size == other // size else self._between

    def _pass(self, run: ChainRun, block: int, entering: Tensor | None) -> Tensor | None:
        """Take block ``[1, B, H, K, columns]`` through a run, noting what enters its segments; returns what leaves it, if anything.

        entering: None where nothing enters, or what enters does not matter for what leaves.
        """
        columns = self._blocks[block]
        state = entering
        last = run.rows[-1]
        for row, cut in zip(run.rows, run.cuts, strict=True):
            if state is not None:
                self._incoming[row, ..., columns] = state[0]
            if row == last and run.target is None:
                return None
            written = self._states[row : row + 1, ..., columns]
            if state is None or cut:
                state = written
            else:
                state = self._transition[row].apply(state) + written
        return state
