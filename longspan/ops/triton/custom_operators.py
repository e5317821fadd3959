"""The two phases as custom operators of PyTorch, with their gradients: `torch.compile` sees two nodes and keeps one graph.

Shapes: B batch rows, T tokens, H heads of v, H_k heads of q and k, K × V a state; N stretches, table and pieces as in
`longspan.ops.triton.stretches`.

The gradients of k and v need the gradient of the state that leaves this rank's segments, which arrives from other ranks after
the read phase's backward has run; so they are found in the write phase's backward, in one pass each that needs q and ∂o as
well. These travel on *tickets*: outputs of write, without values, that the first read of a memory takes, and as whose
"gradients" it hands back q, ∂o and its scale, and the products q ⊙ ∂q, which the gradient of the gates sums. A second read has
no tickets, and gives its share of the gradients itself.
Likewise the gradient that read returns for the states is private to the pair: the running states of the reversed scan, D, which
are right as they are in the write phase's passes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longspan.ops.triton import passes
from longspan.ops.triton.dispatch import Operator, differentiable
from longspan.ops.triton.launch import contiguous_rows
from longspan.ops.triton.passes import COLUMNS, CONTRACTED, Decay, Entering


def _sum_heads(x: Tensor, num_heads: int) -> Tensor:
    """``x [B, T, H, D]`` summed over the heads that share one of `num_heads`."""
    return x if x.shape[2] == num_heads else x.unflatten(2, (num_heads, -1)).sum(3)


def _write_by_kernels(
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    log_decay: Tensor | None,
    start_states: Tensor | None,
    table: Tensor,
    pieces: Tensor,
    starting: Tensor,
    num_slots: int,
    num_ends: int,
    chunk_size: int,
    is_plain: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """States between stretches, and what the other phases need.

    is_plain: nothing enters or leaves a stretch (no start states, no ends, one stretch per piece). Then states and totals
    are empty, and nothing is computed before the queries are there.

    | | shape | |
    |---|---|---|
    | k, v | [B, T, H_k, K], [B, T, H, V] | |
    | g | [B, T, H], [B, T, H, K] or None | log decays |
    | log_decay | [H] or None | constants |
    | start_states | [·, B, H, K, V] or None | for the pieces that start a document |
    | starting | [·] int64 | the numbers of those pieces |
    | states | [num_slots, B, H, K, V] | S before each stretch and behind each piece, from zero or the start state |
    | ends | [num_ends, B, H, K, V] | S behind the pieces that have an end row |
    | totals | [N, B, H] or [N, B, H, K] | log decay over each stretch; empty where nothing decays |
    | sums | [B, T, H, K] | for decays of channels: sums inside chunks; empty for others |
    | tickets | of q, ∂o, scale, of q ⊙ ∂q, of the end | without values; see the module's page |

    Backward, with D the sum of what reads handed back, λ = ∂ends and Z = D + e^{suffix} λ: ∂k and ∂v by the reversed passes of
    `longspan.ops.triton.attend`; ∂g = Σ_{later in the stretch} (q ⊙ ∂q − k ⊙ ∂k) + ⟨S, Z⟩ at the stretch's end, with what the
    tickets bring of the first term and of the end; ∂start = Z at the
    piece's start.
    """
    batch, _, num_heads, value_size = v.shape
    sums = (
        passes.cumulate(g, table, chunk_size, passes.dtype_of_sums(k.dtype))
        if g is not None and g.dim() == 4
        else k.new_empty(0, dtype=torch.float32)
    )
    decay = Decay.of(g, log_decay, sums, chunk_size)
    nothing = k.new_empty(0, dtype=torch.float32)
    states, ends, totals = nothing, nothing.clone(), None
    if not is_plain:
        states, totals = passes.write_pass(k, v, decay, table, num_slots)
        ends = states.new_empty(num_ends, batch, num_heads, k.shape[-1], value_size)
        passes.scan(states, totals, pieces, decay.kind, starts=start_states, ends=ends if num_ends else None)
    return (
        states,
        ends,
        states.new_empty(0) if totals is None else totals,
        sums,
        *_tickets(k, v, g, table),
    )


def _tickets(k: Tensor, v: Tensor, g: Tensor | None, table: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Five tickets, one number each, in the shapes and dtypes of what travels on them.

    These are q, ∂o, the scale, q ⊙ ∂q (the dots of `attend_pass`), and the part of the gates' gradient at the ends of stretches,
    ``[N, B, H]`` or ``[N, B, H, K]``. The last two are empty without g.
    """

    def ticket(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(shape, (0,) * len(shape), dtype=dtype, device=k.device)

    query_dots: tuple[int, ...] = (0,)
    end: tuple[int, ...] = (0,)
    if g is not None:
        query_dots, end = passes.shape_of_dots(g, k), (table.shape[0], g.shape[0], *g.shape[2:])
    return (
        ticket(k.shape, k.dtype),
        ticket(v.shape, v.dtype),
        ticket((), torch.float32),
        ticket(query_dots, torch.float32),
        ticket(end, torch.float32),
    )


def _write_fake(k, v, g, log_decay, start_states, table, pieces, starting, num_slots, num_ends, chunk_size, is_plain):  # type: ignore[no-untyped-def]
    batch, _, num_heads, value_size = v.shape
    size = k.shape[-1]
    nothing = [k.new_empty(0, dtype=torch.float32) for _ in range(4)]
    states, ends, totals, sums = nothing
    of_channels = g is not None and g.dim() == 4
    if not is_plain:
        states = states.new_empty(num_slots, batch, num_heads, size, value_size)
        ends = states.new_empty(num_ends, *states.shape[1:])
        if g is not None or log_decay is not None:
            tail = (batch, num_heads, size) if of_channels else (batch, num_heads)
            totals = states.new_empty(table.shape[0], *tail)
    if of_channels:
        sums = states.new_empty(g.shape, dtype=passes.dtype_of_sums(k.dtype))
    return (states, ends, totals, sums, *_tickets(k, v, g, table))


def _setup_write(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    k, v, g, log_decay, start_states, table, pieces, starting, _, _, chunk_size, _ = inputs
    states, _, totals, sums, *_ = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(k, v, g, log_decay, table, pieces, starting, states, totals, sums)
    ctx.has_start, ctx.chunk_size = start_states is not None, chunk_size


def _write_gradients(ctx: Any, backward: Callable[..., Any], *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    d, grad_ends, _, _, q, do, scale, query_dots, end = grads
    k, v, g, log_decay, table, pieces, starting, states, totals, sums = ctx.saved_tensors
    chunk_size = ctx.chunk_size
    dk, dv, dg, grad_start = backward(
        k,
        v,
        g,
        log_decay,
        table,
        pieces,
        starting,
        states,
        totals,
        sums,
        d,
        grad_ends,
        q,
        do,
        scale,
        query_dots,
        end,
        chunk_size,
        ctx.has_start,
    )
    return (
        dk,
        dv,
        dg if g is not None and ctx.needs_input_grad[2] else None,
        None,
        grad_start if ctx.has_start else None,
        *(None,) * 7,
    )


def _write_backward(
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    log_decay: Tensor | None,
    table: Tensor,
    pieces: Tensor,
    starting: Tensor,
    states: Tensor,
    totals: Tensor,
    sums: Tensor,
    d: Tensor | None,
    grad_ends: Tensor | None,
    q: Tensor | None,
    do: Tensor | None,
    scale: Tensor | None,
    query_dots: Tensor | None,
    end: Tensor | None,
    chunk_size: int,
    has_start: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """∂k, ∂v, ∂g (empty without g) and the gradients of start states ``[·, B, H, K, V]`` (empty without); see `decay_write`."""
    decay = Decay.of(g, log_decay, sums, chunk_size)
    grad_ends = None if grad_ends is None else grad_ends.contiguous()
    suffix = _carried(decay, totals, pieces, grad_ends, reverse=True)
    num_heads, key_heads = v.shape[2], k.shape[2]
    common: dict[str, Any] = {"num_heads": num_heads, "reverse": True, "scale_in": 1.0 if scale is None else scale}
    entering = Entering(d, grad_ends, suffix, transposed=True)
    dotted = None if g is None else k
    of_k = passes.attend_pass(
        v, do, q, decay, entering, table,
        num_columns=k.shape[-1], axis=COLUMNS, dotted=dotted, other_states=None if g is None else states, **common,
    )  # fmt: skip
    dk = of_k.out
    entering = Entering(d, grad_ends, suffix)
    dv = passes.attend_pass(k, q, do, decay, entering, table, num_columns=v.shape[-1], axis=CONTRACTED, **common).out
    dg = k.new_empty(0)
    if g is not None:
        assert of_k.dots is not None
        dg = passes.gate_gradient_pass(
            g, table, of_k.dots, query_dots,
            sign=-1.0, of_end=of_k.of_end, other_end=end, chunk_size=chunk_size,
        )  # fmt: skip
    grad_start = k.new_empty(0, dtype=torch.float32)
    if has_start:
        rows = pieces.index_select(0, starting)
        entering_documents = _entering_at(d, grad_ends, suffix, rows[:, 0], rows[:, 4])
        if entering_documents is None:
            entering_documents = states.new_zeros(starting.shape[0], *states.shape[1:])
        grad_start = entering_documents
    return _sum_heads(dk, key_heads), dv, dg, grad_start


def _write_backward_fake(k, v, g, log_decay, table, pieces, starting, states, *rest):  # type: ignore[no-untyped-def]
    dg = k.new_empty(0) if g is None else torch.empty_like(g, memory_format=torch.contiguous_format)
    starts = states.new_empty((starting.shape[0], *states.shape[1:]) if rest[-1] else (0,))
    return k.new_empty(k.shape), v.new_empty(v.shape), dg, starts


def _carried(
    decay: Decay, totals: Tensor, pieces: Tensor, arriving: Tensor | None, reverse: bool = False
) -> Tensor | None:
    """`passes.carry`, where anything arrives and decays."""
    return None if arriving is None or decay.is_none else passes.carry(totals, pieces, reverse=reverse)


def _arrives(arriving: Tensor | None) -> bool:
    """Whether the state of any piece comes from elsewhere."""
    return arriving is not None and arriving.shape[0] > 0


def _entering_at(
    states: Tensor | None, arriving: Tensor | None, carried: Tensor | None, slots: Tensor, rows: Tensor
) -> Tensor | None:
    """``states[slots] + e^{carried[slots]} arriving[rows]``, nothing arriving for rows of −1; None for zero."""
    at = None if states is None else states.index_select(0, slots)
    if arriving is None or not _arrives(arriving):
        return at
    arrived = arriving.index_select(0, rows.clamp(min=0))
    factor = (rows >= 0).to(arrived.dtype).view(-1, 1, 1, 1, 1)
    if carried is not None:
        decay = carried.index_select(0, slots).exp()
        factor = factor * decay.view(*decay.shape, *(1,) * (5 - decay.dim()))
    return arrived * factor if at is None else torch.addcmul(at, arrived, factor)


def _read(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    g: Tensor | None,
    log_decay: Tensor | None,
    states: Tensor | None,
    arriving: Tensor | None,
    totals: Tensor,
    sums: Tensor,
    ticket_q: Tensor | None,
    ticket_o: Tensor | None,
    ticket_scale: Tensor | None,
    ticket_query_dots: Tensor | None,
    ticket_end: Tensor | None,
    table: Tensor,
    pieces: Tensor,
    scale: float,
    num_heads: int,
    value_size: int,
    chunk_size: int,
) -> Tensor:
    """What the tokens read.

    | | shape | |
    |---|---|---|
    | q | [B, T, H_k, K] | |
    | k, v | [B, T, H_k, K], [B, T, H, V] or None | None: tokens read only what enters their stretch |
    | g, log_decay | as in `decay_write` | |
    | states | [num_slots, B, H, K, V] or None | of this rank's own tokens |
    | arriving | [segments, B, H, K, V] or None | the state that enters each segment |
    | totals, sums | as in `decay_write` | |
    | tickets | as in `decay_write`, or None | None for all reads of a memory but one |
    | o | [B, T, H, V] | |

    Forward: the first row of `longspan.ops.triton.attend`. Backward: ∂q by its second row; D, the running states of the
    reversed scan of G = scale · Σ e^{..} q ∂oᵀ, for `states`; its value where a segment starts for `arriving`; ∂g = Σ_{later in
    the stretch} q ⊙ ∂q + ⟨e^{carried} arriving, D⟩ at the stretch's end; without tickets ∂k and ∂v, too, of what happens inside
    stretches, and with them their "gradients", and no ∂g.
    """
    decay = Decay.of(g, log_decay, sums, chunk_size)
    entering = Entering(states, arriving, _carried(decay, totals, pieces, arriving))
    return passes.attend_pass(
        q, k, v, decay, entering, table,
        num_heads=num_heads, num_columns=value_size, axis=CONTRACTED, scale_out=scale,
    ).out  # fmt: skip


def _read_fake(q, *rest):  # type: ignore[no-untyped-def]
    num_heads, value_size = rest[-3], rest[-2]
    return q.new_empty(q.shape[0], q.shape[1], num_heads, value_size)


def _setup_read(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, g, log_decay, states, arriving, totals, sums, ticket_q, *_ = inputs
    table, pieces, scale, _, _, chunk_size = inputs[14:]
    ctx.save_for_backward(q, k, v, g, log_decay, states, arriving, totals, sums, table, pieces)
    ctx.has_tickets, ctx.scale, ctx.chunk_size = ticket_q is not None, scale, chunk_size


def _read_gradients(ctx: Any, backward: Callable[..., Any], do: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, g, log_decay, states, arriving, totals, sums, table, pieces = ctx.saved_tensors
    do = contiguous_rows(do)
    needs = ctx.needs_input_grad
    dq, dk, dv, dg, d, grad_arriving, query_dots, end = backward(
        do,
        q,
        k,
        v,
        g,
        log_decay,
        states,
        arriving,
        totals,
        sums,
        table,
        pieces,
        ctx.scale,
        ctx.has_tickets,
        ctx.chunk_size,
    )
    inside, has_gate = k is not None and not ctx.has_tickets, g is not None and needs[3]
    tickets: tuple[Tensor | None, ...] = (None,) * 5
    if ctx.has_tickets:
        scale = torch.full((), ctx.scale, dtype=torch.float32, device=q.device)
        tickets = (q, do, scale, query_dots if has_gate else None, end if has_gate and _arrives(arriving) else None)
    return (
        dq,
        dk if inside else None,
        dv if inside else None,
        dg if has_gate and not ctx.has_tickets else None,
        None,
        d if states is not None else None,
        grad_arriving if arriving is not None else None,
        None,
        None,
        *tickets,
        *(None,) * 6,
    )


def _read_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    g: Tensor | None,
    log_decay: Tensor | None,
    states: Tensor | None,
    arriving: Tensor | None,
    totals: Tensor,
    sums: Tensor,
    table: Tensor,
    pieces: Tensor,
    scale: float,
    has_tickets: bool,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `decay_read`, in the order: ∂q, ∂k, ∂v, ∂g, D, ∂arriving, q ⊙ ∂q, and what stretches' ends give the gates.

    ∂k and ∂v are those of the inside of stretches, and are given with ∂g only without tickets; the last two only with tickets.
    What is not given is empty.
    """
    decay = Decay.of(g, log_decay, sums, chunk_size)
    carried = _carried(decay, totals, pieces, arriving)
    num_heads, value_size = do.shape[2:]
    common: dict[str, Any] = {"num_heads": num_heads}
    entering = Entering(states, arriving, carried, transposed=True)
    of_q = passes.attend_pass(
        do, v, k, decay, entering, table,
        num_columns=q.shape[-1], axis=COLUMNS, scale_out=scale, dotted=None if g is None else q, **common,
    )  # fmt: skip
    dq = of_q.out
    d = q.new_empty(0, dtype=torch.float32)
    grad_arriving = torch.zeros_like(arriving) if arriving is not None else None
    if states is not None or arriving is not None:
        num_slots = table.shape[0] + pieces.shape[0]
        d, _ = passes.write_pass(q, do, decay, table, num_slots, scale=scale, reverse=True)
        passes.scan(d, None if decay.is_none else totals, pieces, decay.kind, ends=grad_arriving, reverse=True)
    of_end = None
    if g is not None and _arrives(arriving):
        slots = table[:, 2] + 1
        entered = _entering_at(None, arriving, carried, slots, table[:, 3])
        if entered is not None:
            products = entered * d.index_select(0, slots)
            of_end = products.sum(-1) if decay.is_of_channels else products.sum((-1, -2))
    key_dots = None
    dk, dv, dg = (q.new_empty(0) for _ in range(3))
    if not has_tickets and k is not None and v is not None:
        reverse: dict[str, Any] = {**common, "reverse": True, "scale_in": scale}
        of_k = passes.attend_pass(
            v, do, q, decay, Entering(), table,
            num_columns=k.shape[-1], axis=COLUMNS, dotted=None if g is None else k, **reverse,
        )  # fmt: skip
        dk = of_k.out
        dv = passes.attend_pass(
            k, q, do, decay, Entering(), table, num_columns=value_size, axis=CONTRACTED, **reverse
        ).out
        key_dots = of_k.dots
        dk = _sum_heads(dk, k.shape[2])
    query_dots = end = None
    if g is not None and has_tickets:
        query_dots, end = of_q.dots, of_end
    elif g is not None:
        assert of_q.dots is not None
        dg = passes.gate_gradient_pass(
            g, table, of_q.dots, key_dots,
            sign=1.0, of_end=None if of_end is None else of_end.unsqueeze(0), chunk_size=chunk_size,
        )  # fmt: skip
    grad_q = _sum_heads(dq, q.shape[2])
    grad_arriving, query_dots, end = (q.new_empty(0) if x is None else x for x in (grad_arriving, query_dots, end))
    return grad_q, dk, dv, dg, d, grad_arriving, query_dots, end


def _read_backward_fake(do, q, k, v, g, log_decay, states, arriving, *rest):  # type: ignore[no-untyped-def]
    _, _, table, pieces, _, has_tickets, _ = rest
    inside = k is not None and not has_tickets
    nothing = [q.new_empty(0) for _ in range(6)]
    query_dots, end = nothing[4:]
    if g is not None and has_tickets:
        query_dots = q.new_empty(passes.shape_of_dots(g, q), dtype=torch.float32)
        if _arrives(arriving):
            end = q.new_empty(table.shape[0], g.shape[0], *g.shape[2:], dtype=torch.float32)
    states_like = q.new_empty(0, dtype=torch.float32)
    if states is not None or arriving is not None:
        slots = table.shape[0] + pieces.shape[0]
        states_like = states_like.new_empty(slots, do.shape[0], do.shape[2], q.shape[-1], do.shape[3])
    return (
        q.new_empty(q.shape),
        q.new_empty(k.shape) if inside else nothing[0],
        q.new_empty(v.shape) if inside else nothing[1],
        nothing[2] if g is None or has_tickets else torch.empty_like(g, memory_format=torch.contiguous_format),
        states_like,
        nothing[3] if arriving is None else torch.empty_like(arriving),
        query_dots,
        end,
    )


WRITE = Operator("longspan::decay_write", _write_by_kernels, _write_fake)
READ = Operator("longspan::decay_read", _read, _read_fake)
decay_write = differentiable(
    WRITE,
    Operator("longspan::decay_write_backward", _write_backward, _write_backward_fake),
    _setup_write,
    _write_gradients,
)
decay_read = differentiable(
    READ, Operator("longspan::decay_read_backward", _read_backward, _read_backward_fake), _setup_read, _read_gradients
)
