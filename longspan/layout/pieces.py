"""Segments, into which a sequence is cut for its ranks, and pieces, into which documents cut segments: numbers alone."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """A contiguous run of global positions ``[start, stop)`` held by `rank` as its `slot`-th run."""

    start: int
    stop: int
    rank: int
    slot: int
    starts_document: bool
    """True if a document starts at or after `start` and before `stop`: nothing passes from before to behind the segment."""

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Piece:
    """A maximal run of this rank's tokens inside one segment and one document.

    ``start`` and ``stop`` are local positions, `global_start` is the global position of the first token; `segment` counts this
    rank's segments, `document` all documents.
    """

    start: int
    stop: int
    global_start: int
    segment: int
    document: int
    starts_document: bool
    ends_document: bool

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start


def cut_in_segments(
    lengths: Sequence[int], rank_order: Sequence[int], document_starts: Sequence[int]
) -> tuple[Segment, ...]:
    """All segments of a sequence, in global order.

    lengths: of each segment: one for each rank, or two. rank_order: who holds the first, the second, ...; and with two a rank, who
    holds the last, the last but one, ... document_starts: in rising order.
    """
    num_ranks = len(rank_order)
    num_segments = len(lengths)
    segments = []
    next_start = start = 0
    for index, length in enumerate(lengths):
        stop = start + length
        first = next_start
        while next_start < len(document_starts) and document_starts[next_start] < stop:
            next_start += 1
        in_first_half = index < num_ranks
        place = index if in_first_half else num_segments - 1 - index
        segments.append(Segment(start, stop, rank_order[place], 0 if in_first_half else 1, next_start > first))
        start = stop
    return tuple(segments)


def cut_in_pieces(segments: Sequence[tuple[int, int]], document_bounds: tuple[int, ...]) -> tuple[Piece, ...]:
    """Pieces of a rank's segments, global ``[start, stop)``, in the order in which the rank holds them."""
    pieces = []
    local = 0
    for index, (start, stop) in enumerate(segments):
        document = last_at_or_before(document_bounds, start) if start < stop else 0
        while start < stop:
            end = min(stop, document_bounds[document + 1])
            pieces.append(
                Piece(
                    start=local,
                    stop=local + end - start,
                    global_start=start,
                    segment=index,
                    document=document,
                    starts_document=start == document_bounds[document],
                    ends_document=end == document_bounds[document + 1],
                )
            )
            local += end - start
            start = end
            document += 1
    return tuple(pieces)


def positions_in_documents(pieces: Sequence[Piece], bounds: Sequence[int]) -> Tensor:
    """Position of each token of some pieces inside its document, int64 on the CPU; bounds: where documents start."""
    starts = [piece.global_start - bounds[piece.document] for piece in pieces]
    return torch.cat([torch.arange(s, s + piece.num_tokens) for s, piece in zip(starts, pieces, strict=True)])


def last_at_or_before(bounds: tuple[int, ...], position: int) -> int:
    """Which of the rising `bounds` is the last that is at most `position`."""
    if torch.compiler.is_compiling():
        # A compiler follows Python, and no built-in search.
        return sum(bound <= position for bound in bounds) - 1
    return bisect_right(bounds, position) - 1


def has_any(numbers: Sequence[int], start: int, stop: int) -> bool:
    """Whether any of the rising `numbers` is in [start, stop)."""
    if torch.compiler.is_compiling():
        return any(start <= number < stop for number in numbers)
    return bisect_left(numbers, start) < bisect_left(numbers, stop)
