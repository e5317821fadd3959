"""The tokens before each piece of a rank, as an operator: what any map with a short receptive field needs of other ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.checks import check_count, check_tensor
from longspan.errors import InputError
from longspan.exchange.halo import halo_plan, start_halo
from longspan.layout import SequenceLayout
from longspan.layout.calls import check_layout, check_packed, stops_graphs
from longspan.ops.convolution import index_of
from longspan.tracing import has_no_values, outside_graphs, unseen_by_checkpointing


def halo(x: Tensor, width: int, layout: SequenceLayout) -> Tensor:
    """The `width` tokens before each of this rank's pieces: the runs of its tokens inside one segment and one document.

        before = longspan.halo(x, 2, layout)
        for piece, earlier in zip(layout.pieces, before):
            window = torch.cat([earlier, x[:, piece.start : piece.stop]], dim=1)

    Args:
        x: ``[B, T, ...]``, this rank's tokens; the same shape otherwise and dtype on every rank. With documents, B is 1.
        width: number of tokens, at least 1.
        layout: which tokens this rank holds, and the documents, which never see each other.

    Returns:
        ``[num_pieces, B, width, ...]`` in the order of ``layout.pieces``: the nearest token is the last, and slots before the start
        of a document, or of the sequence, are zero.

    Every rank must take the same calls in the same order, backward too: where x takes gradients it must on every rank, and every
    rank must let what is returned enter its loss, zeros or not: the gradients of the tokens that it sent come back through it.
    One message at most goes each way between two ranks, `width` tokens for each segment.

    Raises:
        InputError: for an x or a width that does not fit.
        LayoutError: if T is not the layout's number of local tokens, or the layout has ranks but no process group.
    """
    if stops_graphs(layout):
        return _halo_outside_graphs(x, width, layout)
    check_tensor("halo", "x", x)
    if x.dim() < 2:
        raise InputError(f"halo takes x [B, T, ...]; got shape {tuple(x.shape)}. Give a single row as x.unsqueeze(0)")
    check_count("halo", "width", width, "the tokens before each piece")
    check_layout(layout, x.shape[1], "halo", sends=not has_no_values(x))
    check_packed("halo", x, layout)
    return _halo(x, width, layout)


_halo_outside_graphs = outside_graphs(halo)


@unseen_by_checkpointing
def _halo(x: Tensor, width: int, layout: SequenceLayout) -> Tensor:
    num_pieces = len(layout.pieces)
    batch, _, *sizes = x.shape
    if has_no_values(x) or halo_plan(layout, width).is_empty:
        return x.new_zeros(num_pieces, batch, width, *sizes)
    channels = x.reshape(*x.shape[:2], -1)
    by_segment = start_halo(channels, layout, width).wait()
    pieces, segments = layout.cached(("halo_of_pieces", x.device), lambda: _first_pieces(layout, x.device))
    # Further pieces of a segment start a document.
    by_piece = by_segment.new_zeros(num_pieces, *by_segment.shape[1:])
    by_piece = by_piece.index_copy(0, pieces, by_segment.index_select(0, segments))
    return by_piece.view(num_pieces, batch, width, *sizes)


def _first_pieces(layout: SequenceLayout, device: torch.device) -> tuple[Tensor, Tensor]:
    """Numbers of the first pieces of this rank's segments, and of those segments."""
    first: dict[int, int] = {}
    for number, piece in enumerate(layout.pieces):
        first.setdefault(piece.segment, number)
    return index_of(list(first.values()), device), index_of(list(first), device)
