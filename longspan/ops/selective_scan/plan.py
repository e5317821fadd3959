"""How a selective scan goes over its tokens and channels: chunks in time, blocks of rows and channels.

A chunk is a run of this rank's tokens, whatever documents and segments they belong to: where a piece starts inside of it the scan
takes another state, and no token is padded. A block is some rows of the batch and some channels of one group, whose chunks are
computed one after another in the same working memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.layout import SequenceLayout

_CHUNK_NUMBERS_CPU = 2**19
"""Numbers of the states of a block after each token of a chunk: few enough for a core's cache."""
_TOKEN_NUMBERS_CPU = 2**14
"""And after one token: enough to be worth the call of an operator."""
_TOKEN_NUMBERS_DEVICE = 2**24


@dataclass(frozen=True)
class Chunk:
    """Local tokens ``[start, stop)``.

    starts, ends: by token, counted from `start`, the number of the piece that starts or ends with it.
    """

    number: int
    start: int
    stop: int
    starts: dict[int, int]
    ends: dict[int, int]

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start

    @property
    def begins_with_a_piece(self) -> bool:
        return 0 in self.starts


@dataclass(frozen=True)
class Block:
    """Rows of the batch and channels that are computed together; the channels are of one group."""

    rows: slice
    channels: slice
    group: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and channels."""
        return self.rows.stop - self.rows.start, self.channels.stop - self.channels.start


def chunks_of(layout: SequenceLayout, chunk_size: int) -> tuple[Chunk, ...]:
    """All local tokens in chunks of `chunk_size`; built once per layout."""
    return layout.cached(("scan chunks", chunk_size), lambda: _cut(layout, range(len(layout.pieces)), chunk_size))


def chunks_of_piece(layout: SequenceLayout, number: int, chunk_size: int) -> tuple[Chunk, ...]:
    """The tokens of one piece in chunks of `chunk_size`; built once per layout."""
    return layout.cached(
        ("chunks of a piece", number, chunk_size), lambda: _cut(layout, range(number, number + 1), chunk_size)
    )


def _cut(layout: SequenceLayout, numbers: range, chunk_size: int) -> tuple[Chunk, ...]:
    """The tokens of pieces that follow one another; a chunk may hold several of them."""
    pieces = [(number, layout.pieces[number]) for number in numbers]
    if not pieces:
        return ()
    starts = {piece.start: number for number, piece in pieces}
    ends = {piece.stop - 1: number for number, piece in pieces}
    first, last = pieces[0][1].start, pieces[-1][1].stop
    chunks = []
    for number, start in enumerate(range(first, last, chunk_size)):
        stop = min(start + chunk_size, last)
        own = range(start, stop)
        chunks.append(
            Chunk(
                number,
                start,
                stop,
                {token - start: starts[token] for token in own if token in starts},
                {token - start: ends[token] for token in own if token in ends},
            )
        )
    return tuple(chunks)


def blocks_of(u: Tensor, num_groups: int, state_size: int, chunk_size: int) -> tuple[Block, ...]:
    """All rows and channels of ``u [B, T, E]``, in blocks that a cache has room for."""
    batch, _, num_channels = u.shape
    on_cpu = u.device.type == "cpu"
    # Operators share what is large among threads.
    of_thread = min(_TOKEN_NUMBERS_CPU, _CHUNK_NUMBERS_CPU // chunk_size)
    numbers = of_thread * torch.get_num_threads() if on_cpu else _TOKEN_NUMBERS_DEVICE
    of_group = num_channels // num_groups
    width = _even_share(of_group, max(1, numbers // state_size))
    height = _even_share(batch, max(1, numbers // (state_size * width)))
    return tuple(
        Block(slice(row, min(row + height, batch)), slice(first, min(first + width, (group + 1) * of_group)), group)
        for group in range(num_groups)
        for first in range(group * of_group, (group + 1) * of_group, width)
        for row in range(0, batch, height)
    )


def _even_share(total: int, largest: int) -> int:
    """The size of shares of `total` that are at most `largest` and as equal as may be."""
    num_shares = -(-total // largest)
    return -(-total // num_shares)
