"""Keys and values of earlier stretches of a sequence, each on the rank that holds them: `EarlierKeys`.

Shapes: B batch rows, T tokens of this rank, L of them that are kept, H_kv key and value heads, D head dimension, D_v that of
values.

A sequence is computed stretch by stretch, each split over the ranks. Keys and values stay where they were made: what is kept of a
stretch is one part, and a further stretch adds a part without touching those that are there. The queries of later stretches
travel to the parts (`longspan.attention.softmax.earlier_reads`), so that no rank ever has another's earlier keys.

Gradients stay with the parts as well. A part's queries come from many later calls, whose backward passes add to one buffer of the
part, in float32 (float64 for float64), so that nothing is rounded between them, however many they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longspan.attention.softmax.host_memory import Fetched, HostMemory
from longspan.autocast import as_in_product
from longspan.checks import check_flag, described
from longspan.dtypes import accumulation_dtype
from longspan.errors import InputError, LayoutError
from longspan.first_order import first_order
from longspan.layout import SequenceLayout
from longspan.layout.calls import check_layout, check_packed, layout_of_one_device
from longspan.layout.visibility import Run, intersection, located, union
from longspan.tracing import breaks_graphs, outside_graphs

NAME = "EarlierKeys"


@dataclass(frozen=True)
class FetchedPart:
    """Keys and values of a part on their way to the device."""

    part: KeyPart
    _fetched: Fetched
    _sums: tuple[Tensor, ...] = ()

    def wait(self) -> tuple[Tensor, ...]:
        """k and v; then, if asked for, the sums of their gradients, which may be added to and given to `KeyPart.keep_grads`."""
        return *self._fetched.wait(), *self._sums


class KeyPart:
    """What one stretch leaves to later ones on this rank: the keys and values of its tokens that are still seen.

    k: ``[B, L, H_kv, D]``. v: ``[B, L, H_kv, D_v]``. On the device, with their graph where they were written in one, or in host
    memory. device: that on which they are computed with. runs: for each rank, which tokens it keeps, as positions from the first
    token of the sequence, in the order of its L.
    """

    def __init__(self, k: Tensor, v: Tensor, runs: tuple[tuple[Run, ...], ...], host: HostMemory | None) -> None:
        self.k, self.v, self.runs, self.host = k, v, runs, host
        self.device = k.device if host is None else host.device
        self._grads: tuple[Tensor, Tensor] | None = None

    def grads(self) -> tuple[Tensor, Tensor]:
        """What the backward passes of later calls have given k and v so far, on the device, in their shapes and dtype."""
        if self._grads is None:
            dk, dv = (torch.zeros_like(x, device=self.device) for x in (self.k, self.v))
        elif self.host is None:
            dk, dv = self._grads
        else:
            dk, dv = self.host.fetch(*self._grads).wait()
        return dk.to(self.k.dtype), dv.to(self.v.dtype)

    def take_grads(self) -> tuple[Tensor, Tensor]:
        """`grads`, of which nothing stays here."""
        found = self.grads()
        self._grads = None
        return found

    def fetch(self, with_grads: bool) -> FetchedPart:
        """Start to bring keys and values to the device, where they are not there, and with them the sum of their gradients."""
        sums: tuple[Tensor, ...] = ()
        if with_grads and self._grads is None:
            dtype = accumulation_dtype(self.k.dtype)
            sums = tuple(torch.zeros_like(x, dtype=dtype, device=self.device) for x in (self.k, self.v))
        kept = self._grads if with_grads and self._grads is not None else ()
        if self.host is None:
            return FetchedPart(self, Fetched((self.k.detach(), self.v.detach(), *kept)), sums)
        return FetchedPart(self, self.host.fetch(self.k, self.v, *kept), sums)

    def keep_grads(self, dk: Tensor, dv: Tensor) -> None:
        """Take the sums of gradients, on the device, in the place of those so far."""
        if self.host is None:
            self._grads = dk, dv
            return
        if self._grads is None:
            self._grads = self.host.put(dk), self.host.put(dv)
            return
        for kept, x in zip(self._grads, (dk, dv), strict=True):
            self.host.store(kept, x)

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values here, without gradients."""
        return self.k.nbytes + self.v.nbytes


class EarlierKeys:
    """Keys and values of all earlier tokens of a sequence, each on the rank that holds them; immutable but for gradients.

    What a softmax layer remembers from one stretch of a sequence to the next, where each stretch is split over the ranks:

        earlier = longspan.EarlierKeys()
        for start in range(0, whole.seq_len, stretch):
            layout = whole.stretch(start, min(start + stretch, whole.seq_len))
            q, k, v = ...                                                     # of this rank's tokens
            o = longspan.softmax_attention(q, k, v, earlier=earlier, layout=layout, window=window)
            earlier = earlier.followed_by(k, v, layout, window=window)

    `followed_by` returns a new object that shares all parts with this one: earlier keys are never copied, and what entered a
    stretch can be kept for its backward pass. Parts that no later token sees (a window, the start of a document) are left out.

    Gradients reach the keys in one of two ways.

    - In a graph: where `followed_by` is given k and v that require gradients, these get in backward what later calls' queries give
      them, as if they had been inputs of those calls.
    - By hand, where stretches were computed without a graph and are computed again one by one, from the last to the first
      (``requires_grad=True``): the backward of a call adds to the gradients of all parts that it read, and the stretch that made a
      part takes them from there when its turn comes:

          again = entering[i].followed_by(k, v, layout)                       # k, v of the stretch, now in a graph
          new, kept = again.last, entering[i + 1].last                        # the same numbers
          if new is not None:
              torch.autograd.backward([loss, new.k, new.v], [None, *kept.grads()])

    Args:
        offload: keep the parts, and their gradients, in host memory (pinned where the device is CUDA), and copy them to the device
            for each use, one part ahead. Parts that are written in a graph stay on the device: their graph holds them.
        requires_grad: let parts without a graph gather gradients.

    Raises:
        InputError: for options that are no flags.

    num_tokens: all tokens so far, those that no part has any more included. parts: in the order of the sequence.
    """

    def __init__(self, *, offload: bool = False, requires_grad: bool = False) -> None:
        self.offload = check_flag(NAME, "offload", offload)
        self.requires_grad = check_flag(NAME, "requires_grad", requires_grad)
        self.num_tokens = 0
        self.parts: tuple[KeyPart, ...] = ()
        self.num_ranks: int | None = None
        self.last: KeyPart | None = None
        """What the last `followed_by` added; None where no later token sees any of it, and before the first."""
        self._host: HostMemory | None = None
        self._ticket: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values on this rank."""
        return sum(part.num_bytes for part in self.parts)

    @property
    def takes_gradient(self) -> bool:
        """Whether the backward of a call that reads them adds to their gradients."""
        return self.requires_grad or self._ticket is not None

    def ticket(self, like: Tensor) -> Tensor | None:
        """What ties the node of a call that reads the parts to those that wrote them, ``[1]``; it carries no numbers."""
        if self._ticket is None and self.requires_grad and torch.is_grad_enabled():
            return like.new_zeros(1, requires_grad=True)
        return self._ticket

    def detach(self) -> EarlierKeys:
        """The same numbers without their graph and their gradients: where a stretch's gradients end."""
        other = self._after(self.num_tokens, self.num_ranks)
        other.requires_grad, other._ticket = False, None
        other.parts = tuple(KeyPart(part.k.detach(), part.v.detach(), part.runs, part.host) for part in self.parts)
        other.last = other.parts[-1] if self.last is not None else None
        return other

    def num_seen(self, layout: SequenceLayout) -> int:
        """How many tokens before the layout's first belong to its first document."""
        return self.num_tokens if layout.continues is None else layout.continues

    def whole(self, layout: SequenceLayout, *, window: int | None = None) -> tuple[Tensor, Tensor]:
        """Keys ``[B, L, H_kv, D]`` and values ``[B, L, H_kv, D_v]`` of all parts, in order, on every rank; without gradients.

        What a prompt that was read stretch by stretch leaves to the tokens behind it, which one rank reads: an `initial_state`.

        Args:
            layout: of any stretch, for its ranks.
            window: as in `softmax_attention`: of the last ``window - 1`` tokens alone.

        Raises:
            InputError: where there is no part.
            LayoutError: for a layout without a process group.

        To be called on every rank. One all-gather for each part: beside the result there are the messages of one part.
        """
        from longspan.attention.softmax.whole_keys import whole_keys

        return whole_keys(self, layout, window)

    def followed_by(
        self, k: Tensor, v: Tensor, layout: SequenceLayout | None = None, *, window: int | None = None
    ) -> EarlierKeys:
        """These keys and values, and after them those of a further stretch: what its successor sees.

        Args:
            k: ``[B, T, H_kv, D]``, this rank's, as given to `softmax_attention`. v: ``[B, T, H_kv, D_v]``.
            layout: which tokens of the stretch this rank holds, any order and lengths; None is one device. Its documents say
                which tokens later ones see: those of its last document.
            window: as in `softmax_attention`: the last ``window - 1`` tokens alone are kept.

        Raises:
            InputError: for keys of another shape or dtype than those before, and for packed documents after earlier tokens where
                the layout does not say which of them the first one continues.
            LayoutError: for another number of tokens than the layout's, of ranks than before, or of earlier tokens than there are.

        No communication, and no copy of what is here. Outside a graph k and v are copied, so that what they were taken from may go.
        """
        if breaks_graphs():
            return _followed_by_outside_graphs(self, k, v, layout, window=window)
        from longspan.attention.softmax.checks import check_keys, check_window

        k, v = as_in_product(k), as_in_product(v)
        check_keys(k, v)
        check_window(window)
        layout = layout_of_one_device(k.shape[1]) if layout is None else layout
        check_layout(layout, k.shape[1], NAME, sends=False)
        check_packed(NAME, k, layout)
        check_earlier(self, k, v, layout)
        num_tokens = self.num_tokens + layout.seq_len
        first_seen = self.num_tokens + layout.document_bounds[-2]
        if layout.num_documents == 1:
            first_seen -= self.num_seen(layout)
        if window is not None:
            first_seen = max(first_seen, num_tokens - window + 1)
        other = self._after(num_tokens, layout.num_ranks)
        other.parts = tuple(part for part in self.parts if any(run[1] > first_seen for run in _all(part.runs)))
        runs = _kept_runs(layout, self.num_tokens, first_seen)
        if not any(runs):
            return other
        own = union(located(runs[layout.rank], _shifted(layout.segments, self.num_tokens)))
        in_graph = torch.is_grad_enabled() and (k.requires_grad or v.requires_grad)
        if in_graph:
            other.last = KeyPart(_rows(k, own), _rows(v, own), runs, None)
            other._ticket = _Keep.apply(other.last.k, other.last.v, self._ticket, other.last)
        else:
            k, v = (_own(_rows(x.detach(), own)) for x in (k, v))
            if self.offload:
                other._host = self._host or HostMemory(k.device)
                k, v = other._host.put(k), other._host.put(v)
            other.last = KeyPart(k, v, runs, other._host)
        other.parts += (other.last,)
        return other

    def _after(self, num_tokens: int, num_ranks: int | None) -> EarlierKeys:
        other = EarlierKeys(offload=self.offload, requires_grad=self.requires_grad)
        other.num_tokens, other.num_ranks, other._host, other._ticket = num_tokens, num_ranks, self._host, self._ticket
        return other


def check_earlier(earlier: object, k: Tensor, v: Tensor, layout: SequenceLayout) -> None:
    """Raise unless `earlier` are keys that queries of these tokens may read, and that these keys may follow.

    Raises:
        InputError, LayoutError: as `EarlierKeys.followed_by`, and InputError for what are no `EarlierKeys`.
    """
    if not isinstance(earlier, EarlierKeys):
        raise InputError(
            f"{NAME}: earlier must be longspan.EarlierKeys or None; got {described(earlier)}. A pair of keys and values that every "
            "rank has whole is an initial_state"
        )
    if earlier.num_ranks not in (None, layout.num_ranks):
        raise LayoutError(
            f"{NAME}: the keys of earlier stretches are on {earlier.num_ranks} ranks, and the layout has {layout.num_ranks}. Split "
            "all stretches over one group"
        )
    if layout.has_document_states and earlier.num_tokens:
        raise InputError(
            f"{NAME}: a layout of {layout.num_documents} documents after {earlier.num_tokens} earlier tokens must say how many of "
            "them are of its first document; got continues=None. Take whole.stretch(start, stop), or give continues="
        )
    if earlier.num_seen(layout) > earlier.num_tokens:
        raise LayoutError(
            f"{NAME}: the layout continues a document of {layout.continues} earlier tokens; there are {earlier.num_tokens} in all. "
            "Give every stretch of the sequence, in order"
        )
    for part in earlier.parts[:1]:
        for name, x, like in (("k", k, part.k), ("v", v, part.v)):
            if (x.shape[0], *x.shape[2:]) != (like.shape[0], *like.shape[2:]) or x.dtype != like.dtype:
                raise InputError(
                    f"{NAME}: {name} must have the rows, heads, channels and dtype of earlier stretches, "
                    f"[{like.shape[0]}, T, {like.shape[2]}, {like.shape[3]}] in {like.dtype}; got {tuple(x.shape)} in {x.dtype}. "
                    "Keep one EarlierKeys for each layer and batch"
                )


class _Keep(torch.autograd.Function):
    """Keys and values that later calls read: its backward gives them what the queries of those calls gave their part.

    | | shape | |
    |---|---|---|
    | k, v | [B, L, H_kv, D], [B, L, H_kv, D_v] | of this rank's tokens that are kept |
    | before | [1] or None | the ticket of the parts before |
    | ticket | [1] | ties the node to those of later calls, and to the next of its kind; carries no numbers |
    """

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, before: Tensor | None, part: KeyPart) -> Tensor:
        ctx.part = part
        return k.new_zeros(1)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_ticket: Tensor) -> tuple[Tensor | None, ...]:
        dk, dv = ctx.part.take_grads()
        return dk, dv, grad_ticket if ctx.needs_input_grad[2] else None, None


def _kept_runs(layout: SequenceLayout, num_before: int, first_seen: int) -> tuple[tuple[Run, ...], ...]:
    """For each rank, its tokens from `first_seen` on, as positions of the sequence; made once per layout."""

    def build() -> tuple[tuple[Run, ...], ...]:
        seen = [(first_seen, num_before + layout.seq_len)]
        held = [_shifted(layout.segments_of(rank), num_before) for rank in range(layout.num_ranks)]
        return tuple(tuple(intersection(own, seen)) for own in held)

    return layout.cached(("softmax_kept_runs", num_before, first_seen), build)


def _shifted(runs: Sequence[Run], distance: int) -> list[Run]:
    return [(start + distance, stop + distance) for start, stop in runs]


def _all(runs: Sequence[Sequence[Run]]) -> list[Run]:
    return [run for own in runs for run in own]


def _rows(x: Tensor, runs: Sequence[Run]) -> Tensor:
    """The tokens of `runs` of x ``[B, T, ...]``, one run after another; x itself where they are all."""
    if list(runs) == [(0, x.shape[1])]:
        return x
    parts = [x[:, start:stop] for start, stop in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1) if parts else x[:, :0]


def _own(x: Tensor) -> Tensor:
    """A copy of ``[B, L, H, D]`` in which the tokens of a head lie side by side, as kernels read them."""
    return x.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)


_followed_by_outside_graphs = outside_graphs(EarlierKeys.followed_by)
