"""Linear attention in which every token reads all tokens of its document, before and after it.

    o_t = scale · Σ_s γ_h^{|t−s|} (q_t·k_s) v_s        (γ = 1: LASP-2, arXiv 2502.07563, Algorithms 1 and 3)

Without decay all tokens read one state, the sum of what the ranks wrote. With a constant decay the sequence is read from both ends:
the causal form on the layout, and on the mirrored layout for the tokens after; a token's own part is in both, and taken out of one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from longspan.attention.linear import (
    Given,
    LinearMemory,
    check_inputs,
    check_query,
    profiled,
    tensors_of,
    write_linear,
)
from longspan.attention.memory import StepMemory
from longspan.attention.opaque import OpaqueMemory, write_opaque
from longspan.autocast import as_in_product, as_written
from longspan.errors import InputError
from longspan.exchange import Exchanger, exchange_named
from longspan.exchange.all_reduce import JoinSum, sum_over_ranks
from longspan.layout import SequenceLayout
from longspan.layout.calls import check_whole, stops_graphs
from longspan.layout.rows import index_on
from longspan.ops.variants import VARIANTS
from longspan.tracing import breaks_graphs, has_no_values, outside_graphs, unseen_by_checkpointing


class MemoryOfBothSides(StepMemory, ABC):
    """What every token reads whole: there is no state before or after it."""

    _name: ClassVar[str]

    @abstractmethod
    def read(self, q: Tensor, scale: float | None = None) -> Tensor:
        """What the tokens read, o ``[B, T, H, V]`` for q ``[B, T, H_k, K]``."""

    def read_overlapped(self, q: Tensor, scale: float | None = None) -> Tensor:
        """`read`: nothing is computed before the exchange has ended."""
        return self.read(q, scale)

    def final_state(self) -> Tensor:
        """Raises InputError."""
        raise InputError(
            f"{self._name}: with causal=False there is no state before or after the sequence; final_state() was called. Leave the "
            "call out, or write with causal=True"
        )


@dataclass
class SummedMemory(MemoryOfBothSides):
    """What all tokens wrote, without decay: one state per document."""

    _name = "linear_attention"

    _k: Tensor
    _states: Tensor
    _layout: SequenceLayout
    _is_traced: bool

    def read(self, q: Tensor, scale: float | None = None) -> Tensor:
        """``o_t = scale · Sᵀ q_t``, S the state of t's document; q ``[B, T, H_k, K]``, o ``[B, T, H, V]``."""
        outside = not self._is_traced and breaks_graphs()
        return (_read_summed_outside_graphs if outside else SummedMemory._read)(self, q, scale)

    @unseen_by_checkpointing
    def _read(self, q: Tensor, scale: float | None) -> Tensor:
        q = as_written(q, self._k)
        factor = check_query("linear_attention", q, self._k, scale)
        joins = torch.is_grad_enabled() and q.requires_grad and self._layout.num_ranks > 1
        if joins and not self._states.requires_grad:
            # Other ranks' keys may take gradients where this rank's do not.
            self._states = JoinSum.apply(self._states, q.new_zeros((), requires_grad=True), self._layout)
        heads = self._states.shape[2]
        states = self._states.to(q.dtype)
        outputs = []
        with profiled("longspan.read", q):
            for piece in self._layout.pieces:
                queries = q[:, piece.start : piece.stop].transpose(1, 2)
                if queries.shape[1] != heads:
                    queries = queries.repeat_interleave(heads // queries.shape[1], dim=1)
                outputs.append((factor * queries @ states[piece.document]).transpose(1, 2))
        return torch.cat(outputs, dim=1)


_read_summed_outside_graphs = outside_graphs(SummedMemory._read)


@dataclass
class TwoSidedMemory(MemoryOfBothSides):
    """What tokens wrote for those after them, and, mirrored, for those before them."""

    _name = "retention"

    _k: Tensor
    _v: Tensor
    _after: LinearMemory | OpaqueMemory
    _before: LinearMemory | OpaqueMemory

    def read(self, q: Tensor, scale: float | None = None) -> Tensor:
        """``o_t = scale · Σ_s γ^{|t−s|} (q_t·k_s) v_s``; q ``[B, T, H_k, K]``, o ``[B, T, H, V]``."""
        q = as_written(q, self._k)
        factor = check_query("retention", q, self._k, scale)
        own = factor * (q * self._k).sum(-1, keepdim=True)
        if own.shape[2] != self._v.shape[2]:
            own = own.repeat_interleave(self._v.shape[2] // own.shape[2], dim=2)
        return self._after.read(q, scale) + self._before.read(q.flip(1), scale).flip(1) - own * self._v


def write_bidirectional(
    operator: str,
    k: Tensor,
    v: Tensor,
    given: Given,
    *,
    layout: SequenceLayout | None = None,
    exchange: str | Exchanger = "auto",
    backend: str | None = None,
    chunk_size: int | None = None,
) -> SummedMemory | TwoSidedMemory | OpaqueMemory:
    """The write phase of `linear_attention` and `retention` with ``causal=False``; see `longspan.write`."""
    if operator not in ("linear_attention", "retention"):
        raise InputError(
            f"causal=False is for 'linear_attention' and 'retention', whose decays do not depend on the token; got "
            f"{operator!r}. Read it causally, once on the tokens and once on x.flip(1) with layout.mirrored"
        )
    if stops_graphs(layout):
        return _write_both_ways_outside_graphs(
            operator, k, v, given, layout=layout, exchange=exchange, backend=backend, chunk_size=chunk_size
        )
    k, v = as_in_product(k), as_in_product(v)
    gates = tensors_of(VARIANTS[operator], given)
    exchange_named(exchange)
    layout, backend = check_inputs(VARIANTS[operator], k, v, gates, None, layout, backend, chunk_size)
    check_whole(operator, layout)
    # A compiler traces kernels as they are: they have operators of their own.
    if has_no_values(k) and (backend == "torch" or not torch.compiler.is_compiling()):
        return write_opaque(VARIANTS[operator], k, v, gates, None, False, layout, backend, chunk_size, causal=False)
    return _write_both_ways(operator, k, v, gates, layout, exchange, backend, chunk_size)


_write_both_ways_outside_graphs = outside_graphs(write_bidirectional)


@unseen_by_checkpointing
def _write_both_ways(
    operator: str,
    k: Tensor,
    v: Tensor,
    gates: Mapping[str, Tensor],
    layout: SequenceLayout,
    exchange: str | Exchanger,
    backend: str,
    chunk_size: int | None,
) -> SummedMemory | TwoSidedMemory:
    if operator == "linear_attention":
        states = _summed_states(k, v, layout, backend, chunk_size)
        return SummedMemory(k, states, layout, torch.compiler.is_compiling())
    options: dict[str, Any] = {"exchange": exchange, "backend": backend, "chunk_size": chunk_size}
    after = write_linear(operator, k, v, gates, layout=layout, **options)
    before = write_linear(operator, k.flip(1), v.flip(1), gates, layout=layout.mirrored, **options)
    return TwoSidedMemory(k, v, after, before)


def _summed_states(k: Tensor, v: Tensor, layout: SequenceLayout, backend: str, chunk_size: int | None) -> Tensor:
    """What each document's tokens wrote, on every rank: ``[num_documents, B, H, K, V]``, by one all-reduce."""
    variant = VARIANTS["linear_attention"]
    pieces = range(len(layout.pieces))
    with profiled("longspan.write", k):
        ends = variant.prepare(k, v, {}, layout, chunk_size, backend).write(k, v, None, pieces, pieces)
    documents = index_on(layout, [piece.document for piece in layout.pieces], k.device)
    states = ends.new_zeros(layout.num_documents, *ends.shape[1:]).index_add(0, documents, ends)
    return sum_over_ranks(states, layout) if layout.num_ranks > 1 else states
