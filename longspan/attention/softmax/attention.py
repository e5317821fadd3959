"""Softmax attention over a sequence that is split over ranks: the public forms and their checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from longspan.attention.memory import StepMemory
from longspan.attention.opaque import bounds_of
from longspan.attention.softmax.all_gather import AllGatherKeys
from longspan.attention.softmax.choice import Shapes, choose
from longspan.attention.softmax.opaque import SOFTMAX, with_positive_scale
from longspan.attention.softmax.pair import Local, Reader
from longspan.attention.softmax.ring import RingKeys
from longspan.attention.softmax.ulysses import Ulysses
from longspan.checks import (
    Unchanged,
    check_choice,
    check_count,
    check_flag,
    check_not_empty,
    check_same_device,
    check_scale,
    check_tensor,
)
from longspan.errors import InputError
from longspan.layout import SequenceLayout
from longspan.layout.sequence_layout import check_layout, stops_graphs
from longspan.layout.visibility import Visibility, visibility_of
from longspan.tracing import breaks_graphs, has_no_values, outside_graphs, unseen_by_checkpointing

SoftmaxMethod = Literal["auto", "all_gather", "ring", "ulysses"]
SOFTMAX_METHODS: tuple[SoftmaxMethod, ...] = ("auto", "all_gather", "ring", "ulysses")
NAME = "softmax attention"
SOFTMAX_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

EXCHANGES: dict[str, type[AllGatherKeys | RingKeys | Ulysses]] = {
    "all_gather": AllGatherKeys,
    "ring": RingKeys,
    "ulysses": Ulysses,
}
"""The code of each method."""


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    layout: SequenceLayout | None = None,
    method: SoftmaxMethod = "auto",
) -> Tensor:
    """Exact softmax attention o_i = Σ_j softmax_j(scale · q_i·k_j) v_j of this rank's tokens over the whole sequence.

    Args:
        q: ``[B, T, H, D]``, float64, float32, bfloat16 or float16; T is this rank's number of tokens, or the whole
            length without a layout.
        k, v: ``[B, T, H_kv, D]``, q's dtype; H a multiple of H_kv, query head h uses key head ``h // (H / H_kv)``.
        causal: token i sees tokens up to itself; False: all of its document.
        window: a token sees the last `window` tokens, itself included; with ``causal=False`` also the next
            ``window - 1``, those less than `window` away on either side. None is no limit.
        scale: a finite number of either sign; None is ``D ** -0.5``. It takes no gradient: a learned one multiplies q.
        layout: who holds which tokens, and the documents, which never see each other; None is one device and one
            document.
        method: how queries meet the keys of other ranks. ``"all_gather"`` (LASP-2, arXiv 2502.07563) brings the keys and
            values to the queries at once; ``"ring"`` (arXiv 2310.01889) lets them travel from rank to rank, for the least
            memory; ``"ulysses"`` (arXiv 2309.14509) gives each rank the whole sequence of some heads. ``"auto"`` chooses by
            memory and a count of operations and bytes, the same on every rank (docs/softmax.md).

    Returns:
        ``[B, T, H, D]`` in q's dtype. Every rank must take the same calls in the same order, backward too. Gradients
        are those of the sum over ranks of what each rank backpropagates.

    Raises:
        InputError: for shapes, dtypes, devices, a window or a method that do not fit; for ``"ulysses"`` with a number of query
            heads that is no multiple of the number of ranks.
        LayoutError: if T is not the layout's number of local tokens.

    No mask or score tensor is built, and blocks that the causal, window or document mask removes whole are neither
    computed nor sent.
    """
    _check_queries(q, k)
    check_scale(NAME, scale, 1.0)
    memory = write_softmax(k, v, layout=layout, method=method, causal=causal, window=window, num_heads=q.shape[2])
    return memory.read(q, scale)


def write_softmax(
    k: Tensor,
    v: Tensor,
    *,
    layout: SequenceLayout | None = None,
    method: SoftmaxMethod = "auto",
    causal: bool = True,
    window: int | None = None,
    num_heads: int | None = None,
) -> SoftmaxMemory | OpaqueSoftmaxMemory:
    """Start giving every rank the keys and values it needs, without waiting for them.

    Args:
        num_heads: number of query heads H that will read, which ``"auto"`` and ``"ulysses"`` look at; None is H_kv.
        the others, errors and source: as in `softmax_attention`.

    Whatever runs before ``read`` hides the exchange, and its backward hides the backward exchange. One rank exchanges
    nothing.
    """
    if stops_graphs(layout):
        return _write_outside_graphs(
            k, v, layout=layout, method=method, causal=causal, window=window, num_heads=num_heads
        )
    check_choice(NAME, "method", method, SOFTMAX_METHODS, "Leave it out for 'auto'")
    if window is not None and not _is_positive(window):
        raise InputError(
            "window must be an integer of at least 1, the number of tokens that a token sees with itself included, or "
            f"None for no limit; got {window!r}. Leave it out for all tokens"
        )
    check_flag(NAME, "causal", causal)
    if num_heads is not None:
        check_count(NAME, "num_heads", num_heads, "the number of heads of q, or None for that of k")
    _check_keys(k, v)
    if layout is None:
        layout = SequenceLayout.local(k.shape[1])
    check_layout(layout, k.shape[1], NAME, sends=not has_no_values(k))
    if has_no_values(k):
        if method == "ulysses" and num_heads is not None:
            check_heads_of_ulysses(num_heads, layout.num_ranks)
        return OpaqueSoftmaxMemory(k, v, bounds_of(layout, k), causal, window, method, layout.num_ranks)
    return _write(k, v, layout, causal, window, method, num_heads)


_write_outside_graphs = outside_graphs(write_softmax)


@unseen_by_checkpointing
def _write(
    k: Tensor,
    v: Tensor,
    layout: SequenceLayout,
    causal: bool,
    window: int | None,
    method: SoftmaxMethod,
    num_heads: int | None,
) -> SoftmaxMemory:
    return SoftmaxMemory(k, v, layout, visibility_of(layout, causal, window), method, num_heads)


class SoftmaxMemory(StepMemory):
    """Keys and values on their way to the ranks that need them; `read` attends to them.

    method: how they are exchanged; what ``"auto"`` has chosen.
    """

    def __init__(
        self,
        k: Tensor,
        v: Tensor,
        layout: SequenceLayout,
        visibility: Visibility,
        method: SoftmaxMethod,
        num_heads: int | None,
    ) -> None:
        if method == "auto":
            rows, _, key_heads, dim = k.shape
            shapes = Shapes(rows, num_heads or key_heads, key_heads, dim, k.element_size())
            method = choose(layout, visibility, shapes, k.device.type) if layout.num_ranks > 1 else "all_gather"
        self.method: SoftmaxMethod = method
        self._k, self._num_ranks = k, layout.num_ranks
        self._written = Unchanged(NAME, k=k, v=v)
        if num_heads is not None:
            self._check_heads(num_heads)
        exchange = EXCHANGES[method](layout, visibility) if layout.num_ranks > 1 else None
        if exchange is None or not exchange.exchanges:
            self._reader = Reader(k, v, Local(layout, visibility))
        else:
            self._reader = Reader(k, v, exchange)

    def read(self, q: Tensor, scale: float | None = None) -> Tensor:
        """Attention ``[B, T, H, D]`` of the queries ``[B, T, H, D]`` of this rank's tokens; see `softmax_attention`.

        Raises:
            InputError: if q does not fit the keys that were written, or k or v was changed in place since.
        """
        return (_read_outside_graphs if breaks_graphs() else SoftmaxMemory._read)(self, q, scale)

    @unseen_by_checkpointing
    def _read(self, q: Tensor, scale: float | None) -> Tensor:
        _check_queries(q, self._k)
        self._check_heads(q.shape[2])
        self._written.check()
        return self._reader.attend(*with_positive_scale(q, check_scale(NAME, scale, q.shape[-1] ** -0.5)))

    def _check_heads(self, num_heads: int) -> None:
        if self.method == "ulysses":
            check_heads_of_ulysses(num_heads, self._num_ranks)


_read_outside_graphs = outside_graphs(SoftmaxMemory._read)


@dataclass
class OpaqueSoftmaxMemory(StepMemory):
    """What `write_softmax` returns for calls without values: see `longspan.tracing`."""

    _k: Tensor
    _v: Tensor
    _bounds: Tensor | None
    _causal: bool
    _window: int | None
    method: SoftmaxMethod
    _num_ranks: int

    def read(self, q: Tensor, scale: float | None = None) -> Tensor:
        """As in `SoftmaxMemory`."""
        _check_queries(q, self._k)
        if self.method == "ulysses":
            check_heads_of_ulysses(q.shape[2], self._num_ranks)
        factor = check_scale(NAME, scale, q.shape[-1] ** -0.5)
        o: Tensor = SOFTMAX(q, self._k, self._v, self._bounds, self._causal, self._window, factor)[0]
        return o


def check_heads_of_ulysses(num_heads: int, num_ranks: int) -> None:
    """Raise InputError unless the ranks can have equally many of the query heads."""
    if num_heads % num_ranks:
        raise InputError(
            f"method 'ulysses' gives each rank an equal number of query heads; got {num_heads} heads for "
            f"{num_ranks} ranks. Use method 'ring' or 'all_gather', which take any number of heads, or a number of "
            "ranks that divides the heads"
        )


def _is_positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _check_keys(k: Tensor, v: Tensor) -> None:
    check_tensor(NAME, "k", k)
    check_tensor(NAME, "v", v)
    if k.dim() != 4 or k.shape != v.shape:
        raise InputError(
            "softmax attention takes k and v of the same shape [B, T, H_kv, D]; "
            f"got k {tuple(k.shape)} and v {tuple(v.shape)}. Heads are a dimension of their own: k.unflatten(-1, (H_kv, D))"
        )
    check_not_empty(NAME, "k", k)
    if k.dtype not in SOFTMAX_DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in SOFTMAX_DTYPES)
        raise InputError(
            f"softmax attention takes {names}; got k of {k.dtype}. Convert it with k.float() or .to(dtype)"
        )
    _check_same(k, v, "k", "v")


def _check_queries(q: Tensor, k: Tensor) -> None:
    check_tensor(NAME, "q", q)
    check_tensor(NAME, "k", k)
    if q.dim() != 4 or k.dim() != 4:
        raise InputError(
            "softmax attention takes q [B, T, H, D] and k, v [B, T, H_kv, D]; "
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
            "Cast them before the call"
        )
    check_same_device(NAME, **{x_name: x, y_name: y})
