"""Softmax attention over a sequence that is split over ranks: the public forms and their checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor

from longspan.attention.memory import StepMemory
from longspan.attention.opaque import bounds_of
from longspan.attention.softmax.checks import (
    NAME,
    check_has_final_state,
    check_heads_of_ulysses,
    check_keys,
    check_queries,
    check_sinks,
    check_softcap,
    check_state,
    check_window,
)
from longspan.attention.softmax.choice import METHODS, choose
from longspan.attention.softmax.earlier import EarlierKeys
from longspan.attention.softmax.final_state import KeysAndValues, final_keys
from longspan.attention.softmax.opaque import SOFTMAX, with_positive_scale
from longspan.attention.softmax.pair import KeyExchange, Local, Past, Reader
from longspan.attention.softmax.shapes import Shapes
from longspan.attention.together import Together
from longspan.autocast import as_in_product, as_written
from longspan.checks import Unchanged, check_choice, check_count, check_flag, check_scale
from longspan.layout import SequenceLayout
from longspan.layout.calls import check_layout, layout_of_one_device, stops_graphs
from longspan.layout.visibility import Visibility, visibility_of
from longspan.tracing import breaks_graphs, has_no_values, outside_graphs, unseen_by_checkpointing

SoftmaxMethod = Literal["auto", "all_gather", "ring", "ulysses"]
SOFTMAX_METHODS: tuple[SoftmaxMethod, ...] = ("auto", "all_gather", "ring", "ulysses")


class AttentionOptions(TypedDict, total=False):
    """What `softmax_attention` takes beside q, k, v and `output_final_state`: for its overloads."""

    causal: bool
    window: int | None
    scale: float | None
    softcap: float | None
    sinks: Tensor | None
    initial_state: KeysAndValues | None
    earlier: EarlierKeys | None
    layout: SequenceLayout | None
    method: SoftmaxMethod


@overload
def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, *, output_final_state: Literal[False] = ..., **options: Unpack[AttentionOptions],
) -> Tensor: ...  # fmt: skip
@overload
def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, *, output_final_state: Literal[True], **options: Unpack[AttentionOptions],
) -> tuple[Tensor, KeysAndValues]: ...  # fmt: skip
@overload
def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, *, output_final_state: bool, **options: Unpack[AttentionOptions],
) -> Tensor | tuple[Tensor, KeysAndValues]: ...  # fmt: skip
def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    initial_state: KeysAndValues | None = None,
    earlier: EarlierKeys | None = None,
    output_final_state: bool = False,
    layout: SequenceLayout | None = None,
    method: SoftmaxMethod = "auto",
) -> Tensor | tuple[Tensor, KeysAndValues]:
    """Exact softmax attention o_i = Σ_j softmax_j(scale · q_i·k_j) v_j of this rank's tokens over the whole sequence.

    Args:
        q: ``[B, T, H, D]``, float64, float32, bfloat16 or float16; T is this rank's number of tokens, or the whole
            length without a layout.
        k, v: ``[B, T, H_kv, D]`` and ``[B, T, H_kv, D_v]``, q's dtype; H a multiple of H_kv, query head h uses key head
            ``h // (H / H_kv)``. D_v may differ from D, as in latent attention. Under torch.autocast q, k, v and the initial state
            are cast as the inputs of a matrix product are.
        causal: token i sees tokens up to itself; False: all of its document.
        window: a token sees the last `window` tokens, itself included; with ``causal=False`` also the next
            ``window - 1``, those less than `window` away on either side. None is no limit.
        scale: a finite number of either sign; None is ``D ** -0.5``. It takes no gradient: a learned one multiplies q.
        softcap: bounds the scaled scores s to ``softcap * tanh(s / softcap)``, as Gemma 2 does; a number above 0. PyTorch's fused
            operators have none: it is computed by PyTorch's operations in tiles, in float32. None is no bound.
        sinks: ``[H]``, any floating dtype: the score of one more key of value 0, which every query of the head sees, as in gpt-oss:
            o is multiplied by ``sigmoid(lse - sink)``. Neither scaled nor capped. The same on every rank; its gradient on a rank is
            that rank's share: sum it over the ranks, like any parameter's. None is none.
        initial_state: keys and values of the L tokens before the first global one, ``(k, v)``, ``[B, L, H_kv, D]`` and
            ``[B, L, H_kv, D_v]``, L at least 0, as `output_final_state` returned them; the same on every rank, their gradient a
            rank's share. For causal attention without documents, or where the layout `continues` a sequence: its first document
            sees the last ones of them. None is none.
        output_final_state: also return the keys and values of all tokens so far, the initial state's included, on every rank: the
            initial state of what follows. With a window, of the last ``window - 1`` alone, which are all that it sees; with
            documents, of the last one alone.
        earlier: keys and values of earlier stretches of the sequence, each on the rank that holds them, in the place of an
            `initial_state` that every rank has whole: the queries travel there. For causal attention; give these keys and values to
            ``earlier.followed_by`` for the stretch that follows. None is none.
        layout: who holds which tokens, and the documents, which never see each other; None is one device and one
            document.
        method: how queries meet the keys of other ranks. ``"all_gather"`` (LASP-2, arXiv 2502.07563) brings the keys and
            values to the queries at once; ``"ring"`` (arXiv 2310.01889) lets them travel from rank to rank, for the least
            memory; ``"ulysses"`` (arXiv 2309.14509) gives each rank the whole sequence of some heads. ``"auto"`` chooses by
            memory and a count of operations and bytes, the same on every rank (docs/softmax.md).

    Returns:
        ``[B, T, H, D_v]`` in q's dtype; with `output_final_state`, the pair (o, final_state), final_state shaped like
        `initial_state`. Its gradient is the sum of what every rank sends back; ranks may let o, the final state or both enter their
        losses. Every rank must take the same calls in the same order, backward too. Gradients are those of the sum over ranks of
        what each rank backpropagates.

    Raises:
        InputError: for shapes, dtypes, devices, a window, a softcap or a method that do not fit; for ``"ulysses"`` with a number of
            query heads that is no multiple of the number of ranks; for an initial or final state, or earlier keys, with
            ``causal=False``, or with documents of a layout that does not say which of them goes on.
        LayoutError: if T is not the layout's number of local tokens, or the layout continues more tokens than there are.

    No mask or score tensor is built, and blocks that the causal, window or document mask removes whole are neither
    computed nor sent.
    """
    q, k, v = as_in_product(q), as_in_product(k), as_in_product(v)
    check_queries(q, k)
    check_scale(NAME, scale, 1.0)
    check_softcap(softcap)
    check_sinks(sinks, q)
    memory = write_softmax(
        k, v, layout=layout, method=method, causal=causal, window=window, num_heads=q.shape[2],
        initial_state=initial_state, earlier=earlier, output_final_state=output_final_state,
    )  # fmt: skip
    o = memory.read(q, scale, softcap=softcap, sinks=sinks)
    return (o, memory.final_state()) if output_final_state else o


def write_softmax(
    k: Tensor,
    v: Tensor,
    *,
    layout: SequenceLayout | None = None,
    method: SoftmaxMethod = "auto",
    causal: bool = True,
    window: int | None = None,
    num_heads: int | None = None,
    initial_state: KeysAndValues | None = None,
    earlier: EarlierKeys | None = None,
    output_final_state: bool = False,
) -> SoftmaxMemory | OpaqueSoftmaxMemory:
    """Start giving every rank the keys and values it needs, without waiting for them.

    Args:
        num_heads: number of query heads H that will read, which ``"auto"`` and ``"ulysses"`` look at; None is H_kv.
        the others, errors and source: as in `softmax_attention`.

    Whatever runs before ``read`` hides the exchange, and its backward hides the backward exchange. One rank exchanges
    nothing.
    """
    if stops_graphs(layout) or (earlier is not None and breaks_graphs()):
        return _write_softmax_outside_graphs(
            k, v, layout=layout, method=method, causal=causal, window=window, num_heads=num_heads,
            initial_state=initial_state, earlier=earlier, output_final_state=output_final_state,
        )  # fmt: skip
    k, v = as_in_product(k), as_in_product(v)
    if isinstance(initial_state, tuple | list):
        initial_state = tuple(as_in_product(x) for x in initial_state)  # type: ignore[assignment]
    check_choice(NAME, "method", method, SOFTMAX_METHODS, "Leave it out for 'auto'")
    check_window(window)
    check_flag(NAME, "causal", causal)
    if num_heads is not None:
        check_count(NAME, "num_heads", num_heads, "the number of heads of q, or None for that of k")
    check_keys(k, v)
    if layout is None:
        layout = layout_of_one_device(k.shape[1])
    check_layout(layout, k.shape[1], NAME, sends=not has_no_values(k))
    check_flag(NAME, "output_final_state", output_final_state)
    past = check_state(initial_state, earlier, output_final_state, k, v, layout, causal, window)
    if has_no_values(k):
        if method == "ulysses" and num_heads is not None:
            check_heads_of_ulysses(num_heads, layout.num_ranks)
        before = None if past is None else Past.of(*past, layout, window)
        return OpaqueSoftmaxMemory(
            k, v, before, output_final_state, bounds_of(layout, k), causal, window, method, layout
        )
    return _write_softmax(k, v, past, earlier, output_final_state, layout, causal, window, method, num_heads)


_write_softmax_outside_graphs = outside_graphs(write_softmax)


@unseen_by_checkpointing
def _write_softmax(
    k: Tensor,
    v: Tensor,
    past: KeysAndValues | None,
    earlier: EarlierKeys | None,
    output_final_state: bool,
    layout: SequenceLayout,
    causal: bool,
    window: int | None,
    method: SoftmaxMethod,
    num_heads: int | None,
) -> SoftmaxMemory:
    visibility = visibility_of(layout, causal, window)
    before = None if past is None else Past.of(*past, layout, window)
    return SoftmaxMemory(k, v, before, earlier, output_final_state, window, layout, visibility, method, num_heads)


class SoftmaxMemory(StepMemory):
    """Keys and values on their way to the ranks that need them; `read` attends to them.

    method: how they are exchanged; what ``"auto"`` has chosen.
    """

    def __init__(
        self,
        k: Tensor,
        v: Tensor,
        past: Past | None,
        earlier: EarlierKeys | None,
        with_final_state: bool,
        window: int | None,
        layout: SequenceLayout,
        visibility: Visibility,
        method: str,
        num_heads: int | None,
    ) -> None:
        if method == "auto":
            rows, _, key_heads, dim = k.shape
            shapes = Shapes(rows, num_heads or key_heads, key_heads, dim, k.element_size(), v.shape[3])
            method = choose(layout, visibility, shapes, k.device.type) if layout.num_ranks > 1 else "all_gather"
        self.method: str = method
        self._k, self._v, self._past, self._window, self._layout = k, v, past, window, layout
        self._with_final_state = with_final_state
        self._final_state: KeysAndValues | None = None
        self._with_gradients = torch.is_grad_enabled()
        before = {} if past is None else {"initial_state[0]": past.k, "initial_state[1]": past.v}
        parts = () if earlier is None else earlier.parts
        before |= {f"earlier.parts[{i}].{name}": getattr(x, name) for i, x in enumerate(parts) for name in ("k", "v")}
        self._written = Unchanged(NAME, k=k, v=v, **before)
        if num_heads is not None:
            self._check_heads(num_heads)
        exchange: KeyExchange | None = METHODS[method](layout, visibility) if layout.num_ranks > 1 else None
        if exchange is None or not exchange.exchanges:
            exchange = Local(layout, visibility)
        self._reader = Reader(k, v, exchange, layout, past, earlier, window)

    def read(
        self,
        q: Tensor,
        scale: float | None = None,
        *,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attention ``[B, T, H, D_v]`` of the queries ``[B, T, H, D]`` of this rank's tokens; see `softmax_attention`.

        Raises:
            InputError: if q or sinks do not fit the keys that were written, or k or v was changed in place since.
        """
        read = _read_softmax_outside_graphs if breaks_graphs() else SoftmaxMemory._read
        return read(self, q, scale, softcap, sinks)

    @unseen_by_checkpointing
    def _read(self, q: Tensor, scale: float | None, softcap: float | None, sinks: Tensor | None) -> Tensor:
        q = as_written(q, self._k)
        check_queries(q, self._k)
        softcap = check_softcap(softcap)
        check_sinks(sinks, q)
        self._check_heads(q.shape[2])
        self._written.check()
        signed, positive = with_positive_scale(q, check_scale(NAME, scale, q.shape[-1] ** -0.5))
        o = self._reader.attend(signed, positive, softcap, sinks)
        if self._with_final_state and self._layout.num_ranks > 1:
            # Whichever of them a rank's loss takes, it runs the collectives of all backward, as every other rank.
            takes_gradient = q.requires_grad or (self._past is not None and self._past.takes_gradient)
            takes_gradient = takes_gradient or (sinks is not None and sinks.requires_grad)
            o, *tied = Together.apply(o, *self._found_final_state(takes_gradient))
            if torch.is_grad_enabled() or not self._with_gradients:
                self._final_state = tied[0], tied[1]
        return o

    def final_state(self) -> KeysAndValues:
        """Keys and values of all tokens so far, or of the last ``window - 1``, on every rank: see `softmax_attention`.

        Raises:
            InputError: where the memory was written without ``output_final_state=True``, or k or v was changed in place since.

        Where the layout has several ranks, ask for it after a read, which has gathered it: ranks may then let o, the final state or
        both enter their losses.
        """
        return (_final_softmax_state_outside_graphs if breaks_graphs() else SoftmaxMemory._kept_final_state)(self)

    def _kept_final_state(self) -> KeysAndValues:
        check_has_final_state(self._with_final_state)
        self._written.check()
        k, v = self._found_final_state(True)
        return (k, v) if torch.is_grad_enabled() else (k.detach(), v.detach())

    @unseen_by_checkpointing
    def _found_final_state(self, joins: bool) -> KeysAndValues:
        if self._final_state is None:
            past = None if self._past is None else (self._past.k, self._past.v)
            with torch.set_grad_enabled(self._with_gradients):
                joins = joins and self._with_gradients
                self._final_state = final_keys(self._k, self._v, past, self._layout, self._window, joins)
        return self._final_state

    def _check_heads(self, num_heads: int) -> None:
        if self.method == "ulysses":
            check_heads_of_ulysses(num_heads, self._layout.num_ranks)


_read_softmax_outside_graphs = outside_graphs(SoftmaxMemory._read)
_final_softmax_state_outside_graphs = outside_graphs(SoftmaxMemory._kept_final_state)


@dataclass
class OpaqueSoftmaxMemory(StepMemory):
    """What `write_softmax` returns for calls without values: see `longspan.tracing`."""

    _k: Tensor
    _v: Tensor
    _past: Past | None
    _with_final_state: bool
    _bounds: Tensor | None
    _causal: bool
    _window: int | None
    method: SoftmaxMethod
    _layout: SequenceLayout

    def read(
        self,
        q: Tensor,
        scale: float | None = None,
        *,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """As in `SoftmaxMemory`."""
        q = as_written(q, self._k)
        check_queries(q, self._k)
        softcap = check_softcap(softcap)
        check_sinks(sinks, q)
        if self.method == "ulysses":
            check_heads_of_ulysses(q.shape[2], self._layout.num_ranks)
        factor = check_scale(NAME, scale, q.shape[-1] ** -0.5)
        past = (None, None) if self._past is None else (self._past.k, self._past.v)
        o: Tensor = SOFTMAX(
            q, self._k, self._v, *past, self._bounds, sinks, self._causal, self._window, factor, softcap
        )[0]
        return o

    def final_state(self) -> KeysAndValues:
        """As in `SoftmaxMemory`."""
        check_has_final_state(self._with_final_state)
        past = None if self._past is None else (self._past.k, self._past.v)
        one_device = self._layout if self._layout.num_ranks == 1 else layout_of_one_device(self._k.shape[1])
        return final_keys(self._k, self._v, past, one_device, self._window, False)
