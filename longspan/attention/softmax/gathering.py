"""All-gather of packed keys and values, of ranks that hold unequal numbers of tokens.

Shapes: L tokens of this rank, M those of the rank that has most, P ranks, B batch, H_kv key and value heads, D head dimension, D_v
that of values.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from longspan.attention.softmax.packing import pack_into, packed_width
from longspan.comm.all_to_all import Flight
from longspan.comm.collectives import all_gather_single
from longspan.comm.numbering import launch
from longspan.comm.traffic import note_collective
from longspan.layout import SequenceLayout, group_of
from longspan.layout.visibility import Run, length


def start_gather(k: Tensor, v: Tensor, longest: int, layout: SequenceLayout, what: str) -> Flight:
    """Start gathering the L tokens of k and v of every rank, packed ``[P · M, B, H_kv · (D + D_v)]``, rank by rank.

    gloo gathers equal lengths only: each rank's are padded to the longest, M. The padding is never read (`gathered_runs`).
    """
    mine = k.new_empty((longest, k.shape[0], packed_width(k, v)))
    pack_into(mine, k, v, [(0, k.shape[1])])
    everyone = mine.new_empty((layout.num_ranks * longest, *mine.shape[1:]))
    others = layout.num_ranks - 1
    note_collective("all_gather", "forward", others * mine.nbytes, others)
    work = launch(
        group_of(layout),
        mine.device,
        what,
        "forward",
        lambda group, _: all_gather_single(everyone, mine, group, async_op=True),
    )
    return Flight(work, everyone, mine)


def gathered_runs(held: Iterable[Sequence[Run]], longest: int) -> list[Run]:
    """Which runs arrive, one after another, of ranks that hold these; the padding is at no position."""
    return [run for own in held for run in (*own, (length(own) - longest, 0))]
