"""Which method `method="auto"` takes: the cheapest by a count of operations and bytes, of those that fit in memory.

Decided from shapes and the layout alone, so that every rank decides the same without asking. Shapes: P ranks, T tokens of the
busiest rank, B batch rows, H heads, H_kv key and value heads, D head dimension; n(r) pairs of queries of rank r and keys that
see each other, of which l(r) with its own keys; R(r) keys of other ranks that rank r sees.

Operations of a pair: 4 · D a query head forward, 10 · D backward (two and five matrix products). The busiest rank counts. A
collective hides behind the blocks that need nothing of it:

    all_gather   max(own blocks, bytes that arrive) + the other blocks, forward and backward
    ring         max(all blocks, bytes that arrive), keys twice and gradients once, and the latency of every round
    ulysses      1/P of all blocks, plus all its bytes: nothing hides them

`all_gather` keeps 2 · R · H_kv · D numbers per row until backward; where that is more than `LARGEST_SHARE` times what the rank
keeps of its own tokens anyway (2 · T · (H + H_kv) · D), it is out. `ulysses` needs H to be a multiple of P.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from longspan.attention.softmax.all_gather import gather_plan, remote_keys
from longspan.attention.softmax.ring import journeys
from longspan.layout import SequenceLayout
from longspan.layout.visibility import Visibility, length, plan_blocks

Method = Literal["all_gather", "ring", "ulysses"]

LARGEST_SHARE = 4.0
"""Gathered keys may take this many times the memory of a rank's own queries, keys, values and outputs."""

WORTHWHILE = 0.95
"""A method is taken before an earlier one of the list (all_gather, ulysses, ring) if it costs less than this part of it."""


@dataclass(frozen=True)
class Machine:
    """What the count assumes, in orders of magnitude; the ratio alone matters, and only where methods are close."""

    flops_per_byte: float
    """Operations that a rank does while one byte arrives."""
    bytes_per_round: float
    """Bytes that arrive while a collective gets started."""


MACHINES = {
    # 50 GFLOP/s a core, 1.5 GB/s and 0.2 ms over gloo.
    "cpu": Machine(flops_per_byte=30.0, bytes_per_round=300e3),
    # 400 TFLOP/s in flash attention, 100 GB/s and 20 us between GPUs.
    "cuda": Machine(flops_per_byte=4000.0, bytes_per_round=2e6),
}


@dataclass(frozen=True)
class Shapes:
    """What a layer computes, as far as its cost goes."""

    num_rows: int
    num_heads: int
    num_key_heads: int
    head_dim: int
    element_size: int


def choose(layout: SequenceLayout, visibility: Visibility, shapes: Shapes, device_type: str) -> Method:
    """The method for a layer; one rank, or ranks that need nothing of each other, take any."""
    machine = MACHINES.get(device_type, MACHINES["cuda"])
    key = "softmax_choice", visibility, shapes, machine
    return layout.cached(key, lambda: _choose(layout, visibility, shapes, machine))


def _choose(layout: SequenceLayout, visibility: Visibility, shapes: Shapes, machine: Machine) -> Method:
    candidates: list[Method] = ["ring"]
    if shapes.num_heads % layout.num_ranks == 0:
        candidates.insert(0, "ulysses")
    share = gathered_share(layout, visibility, shapes)
    if share <= LARGEST_SHARE:
        candidates.insert(0, "all_gather")
    best, lowest = candidates[0], cost(candidates[0], layout, visibility, shapes, machine)
    for method in candidates[1:]:
        this = cost(method, layout, visibility, shapes, machine)
        if this < WORTHWHILE * lowest:
            best, lowest = method, this
    return best


def gathered_share(layout: SequenceLayout, visibility: Visibility, shapes: Shapes) -> float:
    """Memory of the keys that the neediest rank gathers, as a multiple of that of its own q, k, v and o."""
    most = max(map(length, remote_keys(layout, visibility)))
    own = max(layout.tokens_of) * (shapes.num_heads + shapes.num_key_heads)
    return most * shapes.num_key_heads / own


def cost(method: Method, layout: SequenceLayout, visibility: Visibility, shapes: Shapes, machine: Machine) -> float:
    """Seconds of a forward and a backward pass, in the time that a byte takes to arrive."""
    ranks = range(layout.num_ranks)
    held = [layout.segments_of(rank) for rank in ranks]
    pairs = [sum(visibility.num_pairs(run) for run in runs) for runs in held]
    # Forward and backward take 4 and 10 operations per channel.
    one_pair = shapes.num_rows * shapes.num_heads * shapes.head_dim / machine.flops_per_byte
    one_token = 2 * shapes.num_rows * shapes.num_key_heads * shapes.head_dim * shapes.element_size
    if method == "ulysses":
        others = (layout.num_ranks - 1) / layout.num_ranks
        tokens = max(layout.tokens_of) * others
        queries = 2 * shapes.num_rows * shapes.num_heads * shapes.head_dim * shapes.element_size
        arriving = 2 * tokens * (one_token * _copies(layout.num_ranks, shapes.num_key_heads) + queries)
        return 14 * one_pair * sum(pairs) / layout.num_ranks + arriving + 7 * machine.bytes_per_round
    if method == "ring":
        arriving = 0.0
        ways = journeys(layout, visibility)
        for rank in ranks:
            hops = [(ways[rank - hop - 1], hop) for hop in range(layout.num_ranks - 1)]
            keys = sum(length(way.keys[hop]) for way, hop in hops if hop < way.num_hops)
            # As many gradients as keys come by, in float32 at least.
            size = (2 * shapes.element_size + max(4, shapes.element_size)) / shapes.element_size
            arriving = max(arriving, keys * one_token * size)
        rounds = 3 * max(way.num_hops for way in ways)
        return max(14 * one_pair * max(pairs), arriving) + rounds * machine.bytes_per_round
    own = [sum(block.num_pairs for block in plan_blocks(runs, runs, visibility)) for runs in held]
    needs = [length(need) for need in remote_keys(layout, visibility)]
    longest = 0.0
    for rank in ranks:
        gathered = (layout.num_ranks - 1) * max(layout.tokens_of)
        brought = (gathered if gather_plan(layout, visibility).gathers else needs[rank]) * one_token
        returned = max(needs) * one_token
        local, remote = own[rank] * one_pair, (pairs[rank] - own[rank]) * one_pair
        longest = max(longest, max(4 * local, brought) + max(10 * local, returned) + 14 * remote)
    return longest + 2 * machine.bytes_per_round


def _copies(num_ranks: int, num_key_heads: int) -> float:
    """How many ranks have the same key head."""
    return max(1.0, num_ranks / num_key_heads)
