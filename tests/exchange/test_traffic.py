"""What is counted: for every topology what its formula says, and what torch.distributed is asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from longspan.exchange import TOPOLOGIES, Pipelined, Topology, record_traffic
from longspan.exchange.wire import HEADER_BYTES
from longspan.layout import SequenceLayout
from longspan.state import ChannelDecay, Dense, HeadDecay, Transition
from tests.exchange.drain import drain
from tests.exchange.scan import errors_of_scan
from tests.ranks import run_on_ranks

KINDS: list[type[Transition]] = [HeadDecay, ChannelDecay, Dense]
SHAPE = (2, 3, 4, 5)
# None longer than a segment of 4 ranks in zigzag order, so that each topology may be asked; one starts where a segment does.
DOCUMENTS = [0, 6, 13, 20, 24, 31, 39, 46, 52, 60, 64]
NUM_BLOCKS = 3

Sent = tuple[int, int]
"""Bytes and messages."""
Accounts = tuple[Sent, Sent]
"""Forward and backward."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Bytes of a row of a state and of a transition that is sent, on the wire; rows; segments a rank."""

    state: int
    transition: int
    num_rows: int
    num_segments: int


def sizes_of(kind: type[Transition], layout: SequenceLayout, state_dtype: torch.dtype | None) -> Sizes:
    batch, num_heads, key_size, value_size = SHAPE
    numbers = {ChannelDecay: key_size, Dense: key_size * key_size}.get(kind, 0)
    width = 4 if state_dtype is None else state_dtype.itemsize
    return Sizes(key_size * value_size * width, numbers * 4, batch * num_heads, layout.num_segments)


def sent_by_all_gather(layout: SequenceLayout, sizes: Sizes) -> Accounts:
    others = layout.num_ranks - 1
    rows = others * sizes.num_segments * sizes.num_rows
    return (rows * (sizes.state + sizes.transition), others), (rows * sizes.state, others)


def sent_by_rows(members: int, place: int, sizes: Sizes) -> tuple[Sent, Sent, int]:
    """What a scan by rows sends forward and backward, and the rows that the rank takes."""
    rows, segments = sizes.num_rows, sizes.num_segments
    own = rows // members + (place < rows % members)
    owners = min(rows, members)
    messages = (owners - 1) + (members - 1) if own else owners
    returned = segments * (members - 1) * own * sizes.state
    dealt = segments * (rows - own)
    if members == 1:
        messages = 0
    forward = dealt * (sizes.state + sizes.transition) + returned
    return (forward, messages), (dealt * sizes.state + returned, messages), own


def sent_by_all_to_all(layout: SequenceLayout, sizes: Sizes) -> Accounts:
    return sent_by_rows(layout.num_ranks, layout.rank, sizes)[:2]


def sent_by_two_levels(layout: SequenceLayout, sizes: Sizes) -> Accounts:
    assert layout.ranks_per_node is not None
    node, place = divmod(layout.rank, layout.ranks_per_node)
    *inside, own = sent_by_rows(layout.ranks_per_node, place, sizes)
    rail = dataclasses.replace(sizes, num_rows=own)
    *between, _ = sent_by_rows(layout.num_ranks // layout.ranks_per_node, node, rail)
    forward, backward = ((a[0] + b[0], a[1] + b[1]) for a, b in zip(inside, between, strict=True))
    return forward, backward


def sent_by_chain(layout: SequenceLayout, sizes: Sizes, num_blocks: int = 1) -> Accounts:
    """One state for each boundary of segments that a document crosses from rank to rank."""
    crossed = [
        (before.rank, after.rank)
        for before, after in pairwise(layout.all_segments)
        if before.rank != after.rank and after.start not in layout.document_bounds
    ]
    forward = sum(before == layout.rank for before, _ in crossed)
    backward = sum(after == layout.rank for _, after in crossed)
    state = sizes.num_rows * sizes.state
    return (forward * state, forward * num_blocks), (backward * state, backward * num_blocks)


FORMULAS = {
    "all_gather": sent_by_all_gather,
    "all_to_all": sent_by_all_to_all,
    "two_level": sent_by_two_levels,
    "ring": sent_by_chain,
    "pipelined": lambda layout, sizes: sent_by_chain(layout, sizes, NUM_BLOCKS),
    "neighbour": sent_by_chain,
}


@contextmanager
def spy_on_torch() -> Iterator[list[Sent]]:
    """Bytes and messages to other ranks that torch.distributed is asked for inside the block."""
    asked: list[Sent] = []

    def gathered(out: Tensor, local: Tensor, *args: Any, **kwargs: Any) -> None:
        others = dist.get_world_size(kwargs["group"]) - 1
        asked.append((others * (local.nbytes - local.shape[0] * HEADER_BYTES), others))

    def swapped(out: Tensor, local: Tensor, out_sizes: list[int], in_sizes: list[int], **kwargs: Any) -> None:
        own = dist.get_rank(kwargs["group"])
        to_others = [size for rank, size in enumerate(in_sizes) if rank != own]
        row_bytes = local.shape[1] * local.element_size() - HEADER_BYTES
        asked.append((sum(to_others) * row_bytes, sum(size > 0 for size in to_others)))

    def batched(operations: list[dist.P2POp]) -> None:
        asked.extend((operation.tensor.nbytes, 1) for operation in operations if operation.op is dist.isend)

    def refused(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("an exchange asked for an operation that this test does not know")

    known: dict[str, Callable[..., None]] = {
        "all_gather_single": gathered,
        "all_gather_into_tensor": gathered,
        "all_to_all_single": swapped,
        "batch_isend_irecv": batched,
    }
    names = ["all_gather", "all_reduce", "all_to_all", "broadcast", "reduce_scatter_single", "reduce_scatter_tensor"]
    replaced = {}
    for name, note in {**dict.fromkeys([*names, "send", "isend_object"], refused), **known}.items():
        if not hasattr(dist, name):
            continue
        original = replaced[name] = getattr(dist, name)

        def call(*args: Any, _note: Any = note, _original: Any = original, **kwargs: Any) -> Any:
            _note(*args, **kwargs)
            return _original(*args, **kwargs)

        setattr(dist, name, call)
    try:
        yield asked
    finally:
        for name, original in replaced.items():
            setattr(dist, name, original)


def topology_with(name: str, state_dtype: torch.dtype | None) -> Topology:
    return Pipelined(state_dtype, NUM_BLOCKS) if name == "pipelined" else TOPOLOGIES[name](state_dtype)


def counted_and_expected(name: str, order: Any, state_dtype: torch.dtype | None) -> list[tuple[Accounts, Accounts]]:
    """For each layout and kind of transition what the counter and the formula say; the counter and torch say the same."""
    num_ranks = dist.get_world_size()
    ranks_per_node = 2 if num_ranks % 2 == 0 else 1
    found = []
    for documents in (None, DOCUMENTS):
        if name == "neighbour" and documents is None:
            continue
        layout = SequenceLayout(64, order=order, documents=documents, ranks_per_node=ranks_per_node)
        # Groups that are made at the first use ask for operations of their own.
        errors_of_scan(topology_with(name, None), HeadDecay, SHAPE, layout, torch.float32)
        drain(layout)
        for kind in KINDS:
            with record_traffic() as traffic, spy_on_torch() as asked:
                errors_of_scan(topology_with(name, state_dtype), kind, SHAPE, layout, torch.float32)
                drain(layout)
            forward, backward = (traffic.of_phase(phase) for phase in ("forward", "backward"))
            assert len(forward.events) + len(backward.events) == len(traffic.events)
            counted = (forward.bytes_sent, forward.num_messages), (backward.bytes_sent, backward.num_messages)
            assert [(event.bytes_sent, event.num_messages) for event in traffic.events] == asked
            found.append((counted, FORMULAS[name](layout, sizes_of(kind, layout, state_dtype))))
    return found


# The documents are longer than a segment of three ranks, for which neighbour then does not hold.
CASES = [(name, num_ranks) for name in TOPOLOGIES for num_ranks in (3, 4) if name != "neighbour" or num_ranks == 4]


@pytest.mark.slow_rows(r"-4-zigzag$", r"^(two_level|all_to_all)-4")
# Others of their kind run in make test.
@pytest.mark.slow_rows(
    r"^(all_to_all|two_level|all_gather)-3-contiguous$", r"^(pipelined|ring)-3-zigzag$", r"^(pipelined|ring)-4-"
)
@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
@pytest.mark.parametrize(("name", "num_ranks"), CASES)
def test_the_counter_says_what_the_formula_says_and_what_torch_is_asked_for(
    name: str, order: str, num_ranks: int
) -> None:
    for state_dtype in (None, torch.bfloat16):
        for found in run_on_ranks(num_ranks, counted_and_expected, name, order, state_dtype):
            for counted, expected in found:
                assert counted == expected
