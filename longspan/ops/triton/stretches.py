"""How the kernels cut a rank's tokens into stretches, and what they look up of each.

A *stretch* is a run of at most L tokens of one piece (one segment and one document) that one program goes through, chunk by chunk,
with the state in its registers. Between stretches states lie in memory, in *slots*, as in `longspan.ops.tiling`: stretch i of all
reads slot i + p, p the number of its piece, and leaves slot i + p + 1. Long stretches cost little memory; many fill the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.layout import SequenceLayout

MIN_LENGTH, MAX_LENGTH = 128, 2048

# Columns of the tables.
STRETCH_COLUMNS = ("start", "stop", "slot", "segment", "end_row")
PIECE_COLUMNS = ("first_slot", "last_slot", "number", "start_row", "end_row", "segment")


@dataclass(frozen=True)
class Stretches:
    """The stretches of a call.

    table: int32 ``[N, 5]``, a stretch per row: its tokens [start, stop), the slot it reads, the segment whose incoming state its
        piece continues, the row of its piece's end state among those asked for. −1 is none.
    pieces: int32 ``[P, 6]``, a piece per row: its slots, first and last; its number; the rows of its start state and of its end
        state; the segment that it continues. −1 is none.
    starting: int64, the numbers of the pieces that start a document.
    """

    table: Tensor
    pieces: Tensor
    starting: Tensor
    num_slots: int
    num_ends: int
    is_one_a_piece: bool
    """Whether no piece has a second stretch: then no state passes between stretches."""


def stretch_length(layout: SequenceLayout, num_programs_a_stretch: int, num_processors: int) -> int:
    """Tokens of a stretch: as many as leave two programs for every processor of the device; a power of two."""
    length = MAX_LENGTH
    while length > MIN_LENGTH and layout.num_local_tokens // length * num_programs_a_stretch < 2 * num_processors:
        length //= 2
    return length


def stretches_of(layout: SequenceLayout, length: int, end_pieces: tuple[int, ...], device: torch.device) -> Stretches:
    """The stretches of `length` tokens of a layout's local tokens, built once per layout: later calls wait for no device."""
    key = ("stretches", length, end_pieces, device)
    return layout.cached(key, lambda: _build_stretches(layout, length, end_pieces, device))


def _build_stretches(
    layout: SequenceLayout, length: int, end_pieces: tuple[int, ...], device: torch.device
) -> Stretches:
    end_rows = {number: row for row, number in enumerate(end_pieces)}
    table: list[tuple[int, ...]] = []
    pieces: list[tuple[int, ...]] = []
    num_starts = slot = 0
    for number, piece in enumerate(layout.pieces):
        first_slot = slot
        segment = -1 if piece.starts_document else piece.segment
        end_row = end_rows.get(number, -1)
        for start in range(piece.start, piece.stop, length):
            table.append((start, min(start + length, piece.stop), slot, segment, end_row))
            slot += 1
        pieces.append((first_slot, slot, number, num_starts if piece.starts_document else -1, end_row, segment))
        num_starts += piece.starts_document
        slot += 1
    starting = [number for number, piece in enumerate(layout.pieces) if piece.starts_document]

    def on_device(rows: list[tuple[int, ...]], columns: tuple[str, ...]) -> Tensor:
        return torch.tensor(rows, dtype=torch.int32).view(-1, len(columns)).to(device, non_blocking=True)

    return Stretches(
        table=on_device(table, STRETCH_COLUMNS),
        pieces=on_device(pieces, PIECE_COLUMNS),
        starting=torch.tensor(starting, dtype=torch.int64).to(device, non_blocking=True),
        num_slots=slot,
        num_ends=len(end_pieces),
        is_one_a_piece=len(table) == len(pieces),
    )
