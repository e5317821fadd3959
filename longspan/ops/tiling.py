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
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from longspan.layout import Piece, SequenceLayout


@dataclass(frozen=True)
class ChunkBlock:
    """Chunks that are computed in one batch.

    A block of full chunks has consecutive chunk numbers and tokens ``[start, start + num_chunks · chunk_size)``. A block of tails
    has a token index and a mask instead: ``tokens`` int64 [num_chunks · chunk_size], where padding points at the chunk's first
    token, and ``valid`` bool [num_chunks, chunk_size] (None if nothing is padded).
    """

    chunks: slice | Tensor
    slots: slice | Tensor
    num_chunks: int
    chunk_size: int
    start: int
    tokens: Tensor | None = None
    valid: Tensor | None = None
    continuing: tuple[tuple[slice, int], ...] = ()
    """Which of the block's chunks, counted inside the block, lie in a piece that continues a document, and of which segment."""

    def take(self, x: Tensor) -> Tensor:
        """The block's tokens of ``x [B, T, H, D]``, as ``[B, H, num_chunks, chunk_size, D]`` (a view, or a gathered copy)."""
        if self.tokens is None:
            x = x.narrow(1, self.start, self.num_chunks * self.chunk_size)
        else:
            x = x.index_select(1, self.tokens)
        return x.unflatten(1, (self.num_chunks, self.chunk_size)).permute(0, 3, 1, 2, 4)

    def put(self, x: Tensor, values: Tensor) -> None:
        """Write ``values [B, H, num_chunks, chunk_size, D]`` to the block's tokens of ``x [B, T, H, D]``."""
        if self.tokens is None:
            self.take(x).copy_(values)
            return
        flat = values.permute(0, 2, 3, 1, 4).flatten(1, 2)
        tokens = self.tokens
        if self.valid is not None:
            keep = self.valid.flatten()
            flat, tokens = flat[:, keep], tokens[keep]
        x.index_copy_(1, tokens, flat.to(x.dtype))

    @cached_property
    def chunks_and_slots(self) -> list[tuple[int, int]]:
        """The numbers of the block's chunks and of the slots that they read."""
        if isinstance(self.chunks, slice) and isinstance(self.slots, slice):
            chunks, slots = self.chunks, self.slots
            return list(zip(range(chunks.start, chunks.stop), range(slots.start, slots.stop), strict=True))
        assert isinstance(self.chunks, Tensor) and isinstance(self.slots, Tensor)
        return list(zip(self.chunks.tolist(), self.slots.tolist(), strict=True))

    @cached_property
    def next_slots(self) -> slice | Tensor:
        """The slots that the chunks of this block write."""
        if isinstance(self.slots, slice):
            return slice(self.slots.start + 1, self.slots.stop + 1)
        return self.slots + 1


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
    num_tokens: int
    table: Tensor
    """Local token of each place in a chunk, int64 ``[num_chunks, C]``; padding points at the chunk's first token."""
    valid: Tensor | None
    """bool ``[num_chunks, C]``, False where `table` is padding; None if every chunk is full."""
    token_places: Tensor | None
    """Place of each token in the flattened table, int64 ``[T]``; None if every chunk is full."""

    @cached_property
    def _last_chunks(self) -> list[int]:
        return [entry.last_chunk for entry in self.pieces]

    def piece_of_chunk(self, chunk: int) -> int:
        """The number of the piece that a chunk belongs to."""
        return bisect_right(self._last_chunks, chunk)

    def spread(self, x: Tensor) -> Tensor:
        """``x [B, T, ...]`` laid out by chunks, ``[B, num_chunks, C, ...]``; padding repeats a chunk's first token."""
        if self.valid is None:
            return x.unflatten(1, (self.num_chunks, self.chunk_size))
        return x[:, self.table]

    def collect(self, x: Tensor) -> Tensor:
        """``x [B, num_chunks, C, ...]`` back in the order of the tokens, ``[B, T, ...]``: the inverse of `spread`."""
        flat = x.flatten(1, 2)
        return flat if self.token_places is None else flat[:, self.token_places]


def take_rows(x: Tensor, rows: Sequence[int]) -> Tensor:
    """A copy of ``x[rows]``. Rows that follow one another are a slice: a list would be copied to the device, and the host wait."""
    first = rows[0] if rows else 0
    if list(rows) == list(range(first, first + len(rows))):
        return x[first : first + len(rows)].clone()
    return x[list(rows)]


_BLOCK_NUMBERS = 2**18
"""Scores, or numbers of states, of a block: enough to fill a matrix product, few enough to stay in a core's cache."""


def chunks_of_block(k: Tensor, v: Tensor, chunk_size: int) -> int:
    """How many chunks of `chunk_size` tokens to compute at a time; k ``[B, T, H_k, K]``, v ``[B, T, H, V]``."""
    numbers = max(chunk_size**2, k.shape[3] * v.shape[3])
    return max(1, _BLOCK_NUMBERS // (v.shape[0] * v.shape[2] * numbers))


def tile(layout: SequenceLayout, chunk_size: int, block_chunks: int, device: torch.device) -> Tiling:
    """Cut `layout`'s local tokens into chunks of `chunk_size`, computed `block_chunks` at a time; built once per layout."""
    key = ("tiling", chunk_size, block_chunks, device)
    return layout.cached(key, lambda: _build_tiling(layout.pieces, chunk_size, block_chunks, device))


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
            blocks.append(
                ChunkBlock(
                    chunks=slice(chunk + first, chunk + first + count),
                    slots=slice(slot + first, slot + first + count),
                    num_chunks=count,
                    chunk_size=chunk_size,
                    start=piece.start + first * chunk_size,
                    continuing=() if piece.starts_document else ((slice(0, count), piece.segment),),
                )
            )
        if tail:
            tails.append(_Tail(tail, piece.start + num_full * chunk_size, chunk + num_full, slot + num_full, piece))
        num_chunks = num_full + bool(tail)
        piece_slots.append(PieceSlots(piece, chunk, chunk + num_chunks, slot, slot + num_chunks))
        chunk += num_chunks
        slot += num_chunks + 1
    tails.sort(key=lambda tail: tail.length)
    for first in range(0, len(tails), block_chunks):
        blocks.append(_tail_block(tails[first : first + block_chunks], device))
    num_tokens = pieces[-1].stop if pieces else 0
    table, valid, places = _token_table(piece_slots, chunk, chunk_size, num_tokens, device)
    return Tiling(
        chunk_size=chunk_size,
        pieces=tuple(piece_slots),
        blocks=tuple(blocks),
        num_chunks=chunk,
        num_slots=slot,
        num_tokens=num_tokens,
        table=table,
        valid=valid,
        token_places=places,
    )


@dataclass(frozen=True)
class _Tail:
    """The last, shorter chunk of a piece: its number of tokens, first token, chunk and slot."""

    length: int
    token: int
    chunk: int
    slot: int
    piece: Piece


def _tail_block(tails: Sequence[_Tail], device: torch.device) -> ChunkBlock:
    size = tails[-1].length
    continuing = tuple(
        (slice(index, index + 1), tail.piece.segment)
        for index, tail in enumerate(tails)
        if not tail.piece.starts_document
    )
    if len(tails) == 1:
        chunk, slot = tails[0].chunk, tails[0].slot
        return ChunkBlock(
            slice(chunk, chunk + 1), slice(slot, slot + 1), 1, size, tails[0].token, continuing=continuing
        )
    rows = [(tail.length, tail.token, tail.chunk, tail.slot) for tail in tails]
    lengths, tokens, chunks, slots = torch.tensor(rows).unbind(1)
    places = torch.arange(size)
    valid = places < lengths[:, None]
    index = tokens[:, None] + places * valid
    return ChunkBlock(
        chunks=chunks.to(device),
        slots=slots.to(device),
        num_chunks=len(tails),
        chunk_size=size,
        start=-1,
        tokens=index.flatten().to(device),
        valid=None if bool(valid.all()) else valid.to(device),
        continuing=continuing,
    )


def _token_table(
    pieces: Sequence[PieceSlots], num_chunks: int, chunk_size: int, num_tokens: int, device: torch.device
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    starts, lengths = [], []
    for entry in pieces:
        for start in range(entry.piece.start, entry.piece.stop, chunk_size):
            starts.append(start)
            lengths.append(min(chunk_size, entry.piece.stop - start))
    first = torch.tensor(starts, dtype=torch.int64)
    length = torch.tensor(lengths, dtype=torch.int64)
    places = torch.arange(chunk_size)
    valid = places < length[:, None]
    table = first[:, None] + places * valid
    if bool(valid.all()):
        return table.to(device), None, None
    token_places = torch.empty(num_tokens, dtype=torch.int64)
    token_places[table[valid]] = torch.arange(num_chunks * chunk_size).view(num_chunks, chunk_size)[valid]
    return table.to(device), valid.to(device), token_places.to(device)
