"""What softmax attention refuses: shapes, dtypes and options that do not fit, before anything is exchanged."""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.attention.softmax.earlier import check_earlier
from longspan.attention.softmax.final_state import KeysAndValues
from longspan.checks import (
    check_not_empty,
    check_number,
    check_same_device,
    check_tensor,
    check_tensors,
    described,
)
from longspan.errors import InputError
from longspan.layout import SequenceLayout
from longspan.layout.calls import check_whole
from longspan.tracing import has_no_values

NAME = "softmax attention"
SOFTMAX_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_heads_of_ulysses(num_heads: int, num_ranks: int) -> None:
    """Raise InputError unless the ranks can have equally many of the query heads."""
    if num_heads % num_ranks:
        most = next(ranks for ranks in range(num_ranks, 0, -1) if num_heads % ranks == 0)
        raise InputError(
            f"method 'ulysses' gives each rank an equal number of query heads; got {num_heads} heads for "
            f"{num_ranks} ranks. Use method 'ring' or 'all_gather', which take any number of heads, or a number of "
            f"ranks that divides the heads: {most} at most"
        )


def check_has_final_state(has_it: bool) -> None:
    """Raise InputError unless a memory keeps the final state that is asked for."""
    if not has_it:
        raise InputError(
            f"{NAME}: final_state() needs a memory that keeps it; this one was written with output_final_state=False. Write it "
            "with output_final_state=True"
        )


def check_state(
    initial_state: object,
    earlier: object,
    output_final_state: bool,
    k: Tensor,
    v: Tensor,
    layout: SequenceLayout,
    causal: bool,
    window: int | None,
) -> KeysAndValues | None:
    """The initial state, where it is one that k and the layout take; raises, too, for earlier keys that they do not take."""
    if not causal:
        check_whole(NAME, layout)
    if initial_state is None and earlier is None and not output_final_state:
        return None
    if earlier is not None and (initial_state is not None or output_final_state):
        raise InputError(
            f"{NAME}: earlier keys stay on the rank that holds them, and an initial or final state is whole on every rank; got "
            f"earlier and {'an initial_state' if initial_state is not None else 'output_final_state=True'}. Take one of them: what "
            "follows earlier keys is earlier.followed_by(k, v, layout)"
        )
    given = "an initial_state" if initial_state is not None else "earlier keys" if earlier is not None else ""
    given = given or "output_final_state=True"
    if not causal:
        raise InputError(
            f"{NAME}: with causal=False there is no state before or after the sequence; got {given}. Leave out initial_state and "
            "output_final_state, or put the earlier tokens' keys and values before k and v"
        )
    if earlier is not None:
        if has_no_values(k):
            raise InputError(
                f"{NAME}: keys of earlier stretches are read where they lie, and have no place in an exported graph or among "
                "tensors without values; got earlier keys. Take an initial_state, or leave it out"
            )
        check_earlier(earlier, k, v, layout)
        return None
    if layout.has_document_states:
        raise InputError(
            f"{NAME}: documents have keys and values of different lengths, and no state together; got {given} and a layout of "
            f"{layout.num_documents} documents. Take one call for each document, or rows of a batch, without documents; where "
            "they are a stretch of a longer sequence, say so in the layout: continues="
        )
    if initial_state is None:
        return None
    if not isinstance(initial_state, tuple | list) or len(initial_state) != 2:
        raise InputError(
            f"{NAME}: initial_state must be the pair (k, v) of earlier tokens, as output_final_state=True returned it; got "
            f"{described(initial_state)}. Leave it out where there are none"
        )
    past_k, past_v = initial_state
    for number, (x, of, like, size) in enumerate(((past_k, "k", k, "D"), (past_v, "v", v, "D_v"))):
        name = f"initial_state[{number}]"
        check_tensor(NAME, name, x)
        rows, _, heads, dim = like.shape
        fits = x.dim() == 4 and (x.shape[0], *x.shape[2:]) == (rows, heads, dim) and x.shape[1] == past_k.shape[1]
        if not fits or x.dtype != k.dtype:
            raise InputError(
                f"{NAME}: {name} must be [B, L, H_kv, {size}] = ({rows}, L, {heads}, {dim}) in {k.dtype}, as {of} is, "
                f"and L the same for keys and values; got {tuple(x.shape)} in {x.dtype}. Pass what output_final_state=True returned"
            )
        check_same_device(NAME, **{"k": k, name: x})
    seen = 0 if layout.continues is None else layout.continues if window is None else min(layout.continues, window - 1)
    if past_k.shape[1] < seen:
        raise InputError(
            f"{NAME}: the layout's first document sees {seen} earlier tokens (continues={layout.continues}); the initial_state has "
            f"{past_k.shape[1]}. Pass what the stretch before returned, or the number of tokens that there are"
        )
    return past_k, past_v


def check_softcap(softcap: float | None) -> float | None:
    """`softcap` as a float, or None; raises InputError unless it is above 0."""
    if softcap is None:
        return None
    number = check_number(NAME, "softcap", softcap, remedy="Leave it out for none")
    if number <= 0:
        raise InputError(
            f"{NAME}: softcap must be above 0, the bound of scores; got {described(softcap)}. Leave it out for none"
        )
    return number


def check_sinks(sinks: Tensor | None, q: Tensor) -> None:
    """Raise InputError unless sinks are None, or one number for each head of q ``[B, T, H, D]``."""
    if sinks is None:
        return
    check_tensors(NAME, sinks=sinks)
    if tuple(sinks.shape) != (q.shape[2],):
        raise InputError(
            f"{NAME}: sinks must be [H] = ({q.shape[2]},), one score per query head; got shape {tuple(sinks.shape)}. Pass those "
            "of the layer as they are, the same on every rank"
        )
    check_same_device(NAME, q=q, sinks=sinks)


def check_window(window: object) -> None:
    """Raise InputError unless `window` is a number of tokens, or None."""
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise InputError(
            "window must be an integer of at least 1, the number of tokens that a token sees with itself included, or "
            f"None for no limit; got {window!r}. Leave it out for all tokens"
        )


def check_keys(k: Tensor, v: Tensor) -> None:
    """Raise InputError unless k and v are keys and values of one set of tokens."""
    check_tensor(NAME, "k", k)
    check_tensor(NAME, "v", v)
    if k.dim() != 4 or v.dim() != 4 or k.shape[:3] != v.shape[:3]:
        raise InputError(
            "softmax attention takes k [B, T, H_kv, D] and v [B, T, H_kv, D_v] with the same B, T and H_kv; "
            f"got k {tuple(k.shape)} and v {tuple(v.shape)}. Heads are a dimension of their own: k.unflatten(-1, (H_kv, D))"
        )
    check_not_empty(NAME, "k", k)
    check_not_empty(NAME, "v", v)
    if k.dtype not in SOFTMAX_DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in SOFTMAX_DTYPES)
        raise InputError(
            f"softmax attention takes {names}; got k of {k.dtype}. Convert it with k.float() or .to(dtype)"
        )
    _check_same(k, v, "k", "v")


def check_queries(q: Tensor, k: Tensor) -> None:
    """Raise InputError unless q are queries that keys k take."""
    check_tensor(NAME, "q", q)
    check_tensor(NAME, "k", k)
    if q.dim() != 4 or k.dim() != 4:
        raise InputError(
            "softmax attention takes q [B, T, H, D], k [B, T, H_kv, D] and v [B, T, H_kv, D_v]; "
            f"got q {tuple(q.shape)} and k {tuple(k.shape)}. Heads are a dimension of their own: q.unflatten(-1, (H, D))"
        )
    check_not_empty(NAME, "q", q)
    check_not_empty(NAME, "k", k)
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise InputError(
            "q must have k's batch rows, tokens and head dimension (B, T and D of [B, T, H, D]); "
            f"got q {tuple(q.shape)} and k {tuple(k.shape)}. Give each rank the queries of its own tokens"
        )
    if q.shape[2] % k.shape[2]:
        raise InputError(
            f"the number of query heads must be a multiple of the number of key and value heads; got {q.shape[2]} and "
            f"{k.shape[2]}. Each key head serves an equal number of query heads"
        )
    _check_same(q, k, "q", "k")


def _check_same(x: Tensor, y: Tensor, x_name: str, y_name: str) -> None:
    if x.dtype != y.dtype:
        raise InputError(
            f"q, k and v must have one dtype; got {x_name} of {x.dtype} and {y_name} of {y.dtype}. "
            "Cast them before the call, or call under torch.autocast, which does"
        )
    check_same_device(NAME, **{x_name: x, y_name: y})
