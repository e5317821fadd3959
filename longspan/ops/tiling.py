"""How an operator cuts a rank's tokens into chunks, and chunks into blocks that are computed together.

Every piece (a run of tokens in one segment and one document) is cut into full chunks of C tokens and at most one shorter tail.
Chunks are numbered piece by piece in local order. A block of full chunks is a plain slice of the tokens; the tails of many
pieces are gathered and padded to the longest of their block. No chunk ever holds tokens of two documents, so no decay is
ever measured across a boundary.

States between chunks live in *slots*: piece p with n chunks has n + 1 slots, the state that enters its first chunk, ..., the
state that leaves its last. Chunk c of piece p reads slot c + p and writes slot c + p + 1.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from longspan.layout import Piece, SequenceLayout
from longspan.layout.rows import index_on


@dataclass(frozen=True)
class ChunkBlock:
    """Chunks that are computed in one batch.

    A block of full chunks has consecutive chunk numbers and tokens ``[start, start + num_chunks · chunk_size)``. A block of tails
    has a token index instead: ``tokens`` int64 [num_chunks · chunk_size], where padding points at the chunk's first token.

    slots, next_slots: which slots its chunks read and write.
    """

    chunks: slice | Tensor
    slots: slice | Tensor
    next_slots: slice | Tensor
    chunks_and_slots: tuple[tuple[int, int], ...]
    """The numbers of the block's chunks and of the slots that they read."""
    chunk_size: int
    start: int
    tokens: Tensor | None = None
    padding: _Padding | None = None
    """None if nothing is padded."""
    continuing: tuple[tuple[slice, int], ...] = ()
    """Which of the block's chunks, counted inside the block, lie in a piece that continues a document, and of which segment."""

    @property
    def num_chunks(self) -> int:
        return len(self.chunks_and_slots)

    def take(self, x: Tensor) -> Tensor:
        """The block's tokens of ``x [B, T, H, D]``, as ``[num_chunks, B, H, chunk_size, D]`` (a view, or a gathered copy)."""
        if self.tokens is None:
            x = x.narrow(1, self.start, self.num_chunks * self.chunk_size)
        else:
            x = x.index_select(1, self.tokens)
        return x.unflatten(1, (self.num_chunks, self.chunk_size)).permute(1, 0, 3, 2, 4)

    def put(self, x: Tensor, values: Tensor) -> None:
        """Write ``values [num_chunks, B, H, chunk_size, D]`` to the block's tokens of ``x [B, T, H, D]``."""
        if self.tokens is None:
            self.take(x).copy_(values)
            return
        flat, tokens = values.permute(1, 0, 3, 2, 4).flatten(1, 2), self.tokens
        if self.padding is not None:
            flat, tokens = flat.index_select(1, self.padding.kept), self.padding.kept_tokens
        x.index_copy_(1, tokens, flat.to(x.dtype))

    def without_padding(self, x: Tensor, value: float | bool = 0.0) -> Tensor:
        """``x [num_chunks, B, H, chunk_size, D]`` with `value` where a token is padding."""
        return x if self.padding is None else x.masked_fill(self.padding.mask, value)


@dataclass(frozen=True)
class _Padding:
    """Of a block of tails.

    mask: which places are padding, bool ``[n, 1, 1, c, 1]``. kept: the other places, int64, counted over the block. kept_tokens:
    the local tokens there.
    """

    mask: Tensor
    kept: Tensor
    kept_tokens: Tensor


@dataclass(frozen=True)
class PieceSlots:
    """Where the chunks and slots of one piece are: chunks ``[first_chunk, last_chunk)``, slots ``[first_slot, last_slot]``."""

    piece: Piece
    first_chunk: int
    last_chunk: int
    first_slot: int
    last_slot: int


@dataclass(frozen=True)
class Tiling:
    """The chunks, slots and blocks of a rank's tokens; see the module's page."""

    chunk_size: int
    pieces: tuple[PieceSlots, ...]
    blocks: tuple[ChunkBlock, ...]
    num_chunks: int
    num_slots: int
    device: torch.device
    table: Tensor | None
    """Local token of each place in a chunk, int64 ``[num_chunks, C]``; padding points at the chunk's first token."""
    padding: Tensor | None
    """Which places of the table are padding, bool ``[num_chunks, C]``. Both are None if every chunk is full."""

    @cached_property
    def _last_chunks(self) -> list[int]:
        return [entry.last_chunk for entry in self.pieces]

    @cached_property
    def last_slots(self) -> tuple[int, ...]:
        """The slot of the state that leaves each piece."""
        return tuple(entry.last_slot for entry in self.pieces)

    @cached_property
    def start_rows(self) -> dict[int, int]:
        """For each piece that starts a document, its row among them."""
        starting = (number for number, entry in enumerate(self.pieces) if entry.piece.starts_document)
        return {number: row for row, number in enumerate(starting)}

    @cached_property
    def start_slots(self) -> tuple[int, ...]:
        """The slot of the state that enters each piece that starts a document."""
        return tuple(self.pieces[number].first_slot for number in self.start_rows)

    def piece_of_chunk(self, chunk: int) -> int:
        """The number of the piece that a chunk belongs to."""
        return bisect_right(self._last_chunks, chunk)

    def spread(self, x: Tensor) -> Tensor:
        """``x [B, T, H, ...]`` laid out by chunks, ``[num_chunks, B, H, C, ...]``; padding repeats a chunk's first token."""
        x = x.unflatten(1, (self.num_chunks, self.chunk_size)) if self.table is None else x[:, self.table]
        return x.movedim(3, 1).movedim(2, 0)

    def without_padding(self, x: Tensor) -> Tensor:
        """``x [num_chunks, B, H, C, ...]`` with zeros where a token is padding."""
        if self.padding is None:
            return x
        mask = self.padding[:, None, None]
        return x.masked_fill(mask if x.dim() == 4 else mask.unsqueeze(-1), 0.0)

    def enter_pieces(
        self, states: Tensor, pieces: Iterable[int], start_states: Tensor | None, incoming: Tensor | None = None
    ) -> None:
        """Set the state that enters each of `pieces`, in its slot of ``states [num_slots, B, H, K, V]``.

        Its document's start state, of ``start_states [num_starting_pieces, B, H, K, V]``, or what arrived for its segment, of
        ``incoming [num_segments, B, H, K, V]``; zero where there is none.
        """
        for number in pieces:
            entry = self.pieces[number]
            source, row = incoming, entry.piece.segment
            if entry.piece.starts_document:
                source, row = start_states, self.start_rows[number]
            states[entry.first_slot] = 0.0 if source is None else source[row]


_BLOCK_NUMBERS = 2**18
"""Scores, or numbers of states, of a block: enough to fill a matrix product, few enough to stay in a core's cache."""


def chunks_of_block(k: Tensor, v: Tensor, chunk_size: int) -> int:
    """How many chunks of `chunk_size` tokens to compute at a time; k ``[B, T, H_k, K]``, v ``[B, T, H, V]``."""
    numbers = max(chunk_size**2, k.shape[3] * v.shape[3])
    return max(1, _BLOCK_NUMBERS // (v.shape[0] * v.shape[2] * numbers))


def tile(
    layout: SequenceLayout, chunk_size: int, block_chunks: int, device: torch.device, num_steps: int = 1
) -> Tiling:
    """Cut `layout`'s local tokens into chunks of `chunk_size`, computed `block_chunks` at a time; built once per layout.

    num_steps: rows that a token has, one after another: the tiling is then of rows, ``[B, T · num_steps, ...]``. Its pieces,
    chunks, blocks and slots are those of the tokens, each with so many rows for a token.
    """
    key = ("tiling", chunk_size, block_chunks, device, num_steps)
    return layout.cached(
        key,
        lambda: _build_tiling(_in_rows(layout.pieces, num_steps), chunk_size * num_steps, block_chunks, device),
    )


def _in_rows(pieces: Sequence[Piece], num_steps: int) -> Sequence[Piece]:
    """Pieces of tokens as pieces of their rows."""
    if num_steps == 1:
        return pieces
    return [replace(piece, start=piece.start * num_steps, stop=piece.stop * num_steps) for piece in pieces]


def _build_tiling(pieces: Sequence[Piece], chunk_size: int, block_chunks: int, device: torch.device) -> Tiling:
    longest = max((piece.num_tokens for piece in pieces), default=1)
    chunk_size = min(chunk_size, longest)
    piece_slots: list[PieceSlots] = []
    blocks: list[ChunkBlock] = []
    tails: list[_Tail] = []
    chunk = slot = 0
    for piece in pieces:
        num_full, tail = divmod(piece.num_tokens, chunk_size)
        for first in range(0, num_full, block_chunks):
            count = min(block_chunks, num_full - first)
            start = piece.start + first * chunk_size
            blocks.append(_full_block(piece, chunk + first, slot + first, count, chunk_size, start))
        if tail:
            tails.append(_Tail(tail, piece.start + num_full * chunk_size, chunk + num_full, slot + num_full, piece))
        num_chunks = num_full + bool(tail)
        piece_slots.append(PieceSlots(piece, chunk, chunk + num_chunks, slot, slot + num_chunks))
        chunk += num_chunks
        slot += num_chunks + 1
    tails.sort(key=lambda tail: tail.length)
    for first in range(0, len(tails), block_chunks):
        blocks.append(_tail_block(tails[first : first + block_chunks], device))
    table, padding = _token_table(piece_slots, chunk_size, device)
    return Tiling(chunk_size, tuple(piece_slots), tuple(blocks), chunk, slot, device, table, padding)


@dataclass(frozen=True)
class _Tail:
    """The last, shorter chunk of a piece: its number of tokens, first token, chunk and slot."""

    length: int
    token: int
    chunk: int
    slot: int
    piece: Piece


def _full_block(piece: Piece, chunk: int, slot: int, count: int, chunk_size: int, start: int) -> ChunkBlock:
    """`count` chunks of one piece that follow one another, from this chunk, slot and token."""
    chunks, slots = range(chunk, chunk + count), range(slot, slot + count)
    return ChunkBlock(
        chunks=slice(chunk, chunk + count),
        slots=slice(slot, slot + count),
        next_slots=slice(slot + 1, slot + 1 + count),
        chunks_and_slots=tuple(zip(chunks, slots, strict=True)),
        chunk_size=chunk_size,
        start=start,
        continuing=() if piece.starts_document else ((slice(0, count), piece.segment),),
    )


def _tail_block(tails: Sequence[_Tail], device: torch.device) -> ChunkBlock:
    if len(tails) == 1:
        (tail,) = tails
        return _full_block(tail.piece, tail.chunk, tail.slot, 1, tail.length, tail.token)
    size = tails[-1].length
    lengths, first_tokens, chunks, slots = torch.tensor(
        [(tail.length, tail.token, tail.chunk, tail.slot) for tail in tails]
    ).unbind(1)
    places = torch.arange(size)
    is_padding = places >= lengths[:, None]
    tokens = (first_tokens[:, None] + places * ~is_padding).flatten()
    padding = None
    if bool(is_padding.any()):
        kept = (~is_padding).flatten().nonzero().squeeze(1)
        padding = _Padding(is_padding[:, None, None, :, None].to(device), kept.to(device), tokens[kept].to(device))
    return ChunkBlock(
        chunks=chunks.to(device),
        slots=slots.to(device),
        next_slots=(slots + 1).to(device),
        chunks_and_slots=tuple((tail.chunk, tail.slot) for tail in tails),
        chunk_size=size,
        start=-1,
        tokens=tokens.to(device),
        padding=padding,
        continuing=tuple(
            (slice(index, index + 1), tail.piece.segment)
            for index, tail in enumerate(tails)
            if not tail.piece.starts_document
        ),
    )


def _token_table(
    pieces: Sequence[PieceSlots], chunk_size: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    starts, lengths = [], []
    for entry in pieces:
        for start in range(entry.piece.start, entry.piece.stop, chunk_size):
            starts.append(start)
            lengths.append(min(chunk_size, entry.piece.stop - start))
    if all(length == chunk_size for length in lengths):
        return None, None
    places = torch.arange(chunk_size)
    padding = places >= torch.tensor(lengths)[:, None]
    table = torch.tensor(starts)[:, None] + places * ~padding
    return table.to(device), padding.to(device)


def unwritten_state_gradients(states: Tensor, tiling: Tiling, layout: SequenceLayout) -> Tensor:
    """Memory for the gradient of ``states [num_slots, B, H, K, V]``, of which every block writes the slots that it reads.

    Nobody reads the states that leave pieces: theirs is zero.
    """
    grads = torch.empty_like(states)
    return grads.index_fill_(0, index_on(layout, tiling.last_slots, grads.device), 0.0)
