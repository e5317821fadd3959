"""The tokens before each piece of a rank, and the last ones: what a map with a short receptive field needs of other ranks."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from longspan.attention.convolution import before_heads, final_tokens
from longspan.attention.one_state import state_of_last, states_of_documents
from longspan.attention.together import Together
from longspan.checks import check_count, check_flag, check_tensor
from longspan.errors import InputError
from longspan.exchange.halo import halo_plan, start_halo
from longspan.layout import SequenceLayout
from longspan.layout.calls import check_layout, check_packed, stops_graphs
from longspan.layout.rows import index_of
from longspan.ops.convolution import kept_heads
from longspan.tracing import has_no_values, outside_graphs, unseen_by_checkpointing


@overload
def halo(
    x: Tensor, width: int, layout: SequenceLayout, *, initial_state: Tensor | None = ..., output_final_state: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def halo(
    x: Tensor, width: int, layout: SequenceLayout, *, initial_state: Tensor | None = ..., output_final_state: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def halo(
    x: Tensor, width: int, layout: SequenceLayout, *, initial_state: Tensor | None = ..., output_final_state: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def halo(
    x: Tensor,
    width: int,
    layout: SequenceLayout,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The `width` tokens before each of this rank's pieces: the runs of its tokens inside one segment and one document.

        before = longspan.halo(x, 2, layout)
        for piece, earlier in zip(layout.pieces, before):
            window = torch.cat([earlier, x[:, piece.start : piece.stop]], dim=1)

    Args:
        x: ``[B, T, ...]``, this rank's tokens; the same shape otherwise and dtype on every rank. With documents, B is 1.
        width: number of tokens, at least 1.
        layout: which tokens this rank holds, and the documents, which never see each other.
        initial_state: the `width` tokens before the first global one, ``[B, width, ...]``, or before each document,
            ``[num_documents, width, ...]`` (one for all where the layout `continues` a sequence), the nearest last; the dtype of x;
            the same on every rank, its gradient a rank's share. None is zeros.
        output_final_state: also return the last `width` tokens (of each document) on every rank: the initial state of what follows.

    Returns:
        ``[num_pieces, B, width, ...]`` in the order of ``layout.pieces``: the nearest token is the last, and slots before the start
        of a document, or of the sequence, are the initial state's, or zero. With `output_final_state`, the pair (halo,
        final_state), final_state shaped like `initial_state`. Its gradient is the sum of what every rank sends back.

    Every rank must take the same calls in the same order, backward too: where x takes gradients it must on every rank, and every
    rank must let what is returned enter its loss, zeros or not: the gradients of the tokens that it sent come back through it.
    One message at most goes each way between two ranks, `width` tokens for each segment.

    Raises:
        InputError: for an x, a width or an initial state that does not fit.
        LayoutError: if T is not the layout's number of local tokens, or the layout has ranks but no process group.
    """
    if stops_graphs(layout):
        return _halo_outside_graphs(
            x, width, layout, initial_state=initial_state, output_final_state=output_final_state
        )
    _check("halo", x, width, layout, "the tokens before each piece")
    check_flag("halo", "output_final_state", output_final_state)
    _check_initial_state("halo", initial_state, x, width, layout)
    initial_state = states_of_documents(initial_state, layout)
    before, final_state = _halo(x, width, layout, initial_state, output_final_state)
    return before if final_state is None else (before, final_state)


def tail(x: Tensor, width: int, layout: SequenceLayout, *, initial_state: Tensor | None = None) -> Tensor:
    """The last `width` tokens of the whole sequence on every rank, whoever holds them: what a cache keeps for what follows.

        last = longspan.tail(x, 3, layout)  # of a convolution of 4 taps
        following = longspan.causal_conv1d(new, weight, initial_state=last)

    Args:
        x: ``[B, T, ...]``, this rank's tokens; the same shape otherwise and dtype on every rank. With documents, B is 1.
        width: number of tokens, at least 1.
        layout: which tokens this rank holds, and the documents, each of which has its own last tokens.
        initial_state: the `width` tokens before the first global one, ``[B, width, ...]``, or before each document,
            ``[num_documents, width, ...]`` (one for all where the layout `continues` a sequence); the dtype of x; the same on every
            rank, its gradient a rank's share. They count where there are fewer than `width` tokens. None is zeros.

    Returns:
        ``[B, width, ...]``, or of each document ``[num_documents, width, ...]`` (of the last alone where the layout `continues` a
        sequence): the last token is the last, and slots before the first are the initial state's, or zero. That is the
        ``final_state`` of `halo` and of `causal_conv1d`, and the initial state of a call that goes on. Its gradient goes back to
        the rank that holds the token, as the sum of what every rank sends back.

    Every rank must take the same calls in the same order, backward too: where x takes gradients it must on every rank, and every
    rank must let what is returned enter its loss. One all-reduce of ``width`` tokens for each row or document.

    Raises:
        InputError: for an x, a width or an initial state that does not fit.
        LayoutError: if T is not the layout's number of local tokens, or the layout has ranks but no process group.
    """
    if stops_graphs(layout):
        return _tail_outside_graphs(x, width, layout, initial_state=initial_state)
    _check("tail", x, width, layout, "the last tokens")
    _check_initial_state("tail", initial_state, x, width, layout)
    return _tail(x, width, layout, states_of_documents(initial_state, layout))


_halo_outside_graphs = outside_graphs(halo)
_tail_outside_graphs = outside_graphs(tail)


def _check(operator: str, x: Tensor, width: int, layout: SequenceLayout, meaning: str) -> None:
    check_tensor(operator, "x", x)
    if x.dim() < 2:
        raise InputError(
            f"{operator} takes x [B, T, ...]; got shape {tuple(x.shape)}. Give a single row as x.unsqueeze(0)"
        )
    check_count(operator, "width", width, meaning)
    check_layout(layout, x.shape[1], operator, sends=not has_no_values(x))
    check_packed(operator, x, layout)


def _check_initial_state(
    operator: str, initial_state: Tensor | None, x: Tensor, width: int, layout: SequenceLayout
) -> None:
    if initial_state is None:
        return
    check_tensor(operator, "initial_state", initial_state)
    rows, first = (layout.num_documents, "num_documents") if layout.has_document_states else (x.shape[0], "B")
    expected = (rows, width, *x.shape[2:])
    fits = initial_state.dtype == x.dtype and initial_state.device == x.device
    if tuple(initial_state.shape) != expected or not fits:
        raise InputError(
            f"{operator}: initial_state must be the tokens before, [{first}, width, ...] = {expected} in {x.dtype} on {x.device}; "
            f"got {tuple(initial_state.shape)} in {initial_state.dtype} on {initial_state.device}. Convert it with .to(x)"
        )


@unseen_by_checkpointing
def _halo(
    x: Tensor, width: int, layout: SequenceLayout, initial_state: Tensor | None, output_final_state: bool
) -> tuple[Tensor, Tensor | None]:
    num_pieces = len(layout.pieces)
    batch, num_tokens, *sizes = x.shape
    if has_no_values(x):
        final_state = _without_values(x, width, layout) if output_final_state else None
        return x.new_zeros(num_pieces, batch, width, *sizes), final_state
    channels = x.reshape(batch, num_tokens, -1)
    states = None if initial_state is None else initial_state.reshape(-1, width, channels.shape[2])
    by_segment = None
    if not halo_plan(layout, width).is_empty:
        joins = torch.is_grad_enabled() and states is not None and states.requires_grad
        by_segment = start_halo(channels, layout, width, joins=joins).wait()
    before = channels.new_zeros(num_pieces, batch, width, channels.shape[2])
    if by_segment is not None or states is not None:
        heads = kept_heads(layout, width, states is not None, x.device)
        places = layout.cached(
            ("halo_of_pieces", states is not None, x.device), lambda: _pieces_of_heads(layout, states, x)
        )
        before = before.index_copy(0, places, before_heads(by_segment, states, heads, layout))
    before = before.view(num_pieces, batch, width, *sizes)
    if not output_final_state:
        return before, None
    final_state = state_of_last(final_tokens(channels, states, layout, width, joins=before.requires_grad), layout)
    final_state = final_state.reshape(-1, width, *sizes)
    return Together.apply(before, final_state) if layout.num_ranks > 1 else (before, final_state)


@unseen_by_checkpointing
def _tail(x: Tensor, width: int, layout: SequenceLayout, initial_state: Tensor | None) -> Tensor:
    if has_no_values(x):
        return _without_values(x, width, layout)
    batch, num_tokens, *sizes = x.shape
    channels = x.reshape(batch, num_tokens, -1)
    states = None if initial_state is None else initial_state.reshape(-1, width, channels.shape[2])
    joins = torch.is_grad_enabled() and x.requires_grad
    last = state_of_last(final_tokens(channels, states, layout, width, joins=joins), layout)
    return last.reshape(-1, width, *sizes)


def _without_values(x: Tensor, width: int, layout: SequenceLayout) -> Tensor:
    rows = layout.num_documents if layout.has_document_states else x.shape[0]
    return x.new_zeros(rows, width, *x.shape[2:])


def _pieces_of_heads(layout: SequenceLayout, states: Tensor | None, x: Tensor) -> Tensor:
    """Numbers of the pieces before which something stands, in the order of `kept_heads`: the others start a document."""
    continuing: dict[int, int] = {}
    started: list[int] = []
    for number, piece in enumerate(layout.pieces):
        if not piece.starts_document:
            continuing.setdefault(piece.segment, number)
        elif states is not None:
            started.append(number)
    return index_of([*continuing.values(), *started], x.device)
