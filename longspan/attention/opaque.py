"""The operators as one operator of PyTorch each, for calls without values: see `longspan.tracing`.

Documents travel as a tensor of bounds, and lengths in the shapes, so that neither is a constant of a compiled graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longspan.attention.memory import StepMemory
from longspan.attention.one_state import state_of_last, states_of_documents
from longspan.autocast import as_written
from longspan.dtypes import accumulation_dtype
from longspan.errors import InputError, LayoutError
from longspan.layout import SequenceLayout
from longspan.layout.calls import layout_of_one_device
from longspan.ops.variants.variant import Variant
from longspan.tracing import OpaqueOperator

MAX_GATES = 3


def bounds_of(layout: SequenceLayout | None, x: Tensor) -> Tensor | None:
    """The bounds of the layout's documents as an operator on x takes them, int64 ``[num_documents + 1]``; None without documents.

    Raises:
        LayoutError: where a program for several ranks is to be exported: it would hold no exchange.
    """
    if layout is None:
        return None
    if layout.num_ranks > 1 and torch.compiler.is_compiling():
        raise LayoutError(
            f"a graph for one of {layout.num_ranks} ranks cannot be exported, as exchanges are not traced; export the model on one "
            "device, without a layout"
        )
    if not layout.is_packed:
        return None
    if torch.compiler.is_compiling():
        return layout.cu_seqlens
    return x.new_empty(layout.num_documents + 1, dtype=torch.int64)


def layout_of(x: Tensor, bounds: Tensor | None) -> SequenceLayout:
    """The layout of one device for x ``[B, T, ...]`` and the documents of `bounds_of`, with what calls have built of it already."""
    return layout_of_one_device(x.shape[1], None if bounds is None else tuple(bounds.tolist()))


def _linear(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    gate_0: Tensor | None,
    gate_1: Tensor | None,
    gate_2: Tensor | None,
    initial_state: Tensor | None,
    bounds: Tensor | None,
    operator: str,
    causal: bool,
    output_final_state: bool,
    scale: float | None,
    backend: str | None,
    chunk_size: int | None,
    has_safe_gates: bool,
) -> tuple[Tensor, Tensor]:
    """o (empty without q), and the final state (empty where it is not wanted)."""
    from longspan.attention.bidirectional import write_bidirectional
    from longspan.attention.linear import write_linear
    from longspan.ops.variants import VARIANTS

    given = [gate for gate in (gate_0, gate_1, gate_2) if gate is not None]
    gates = {gate.name: x for gate, x in zip(VARIANTS[operator].gates, given, strict=True)}
    options: dict[str, Any] = {"layout": layout_of(k, bounds), "backend": backend, "chunk_size": chunk_size}
    if not causal:
        assert q is not None
        return write_bidirectional(operator, k, v, gates, **options).read(q, scale), k.new_empty(0)
    memory = write_linear(
        operator, k, v, gates, initial_state=initial_state, output_final_state=output_final_state, **options
    )
    o = k.new_empty(0) if q is None else memory.read(q, scale)
    return o, memory.final_state() if output_final_state else k.new_empty(0)


def _linear_fake(q, k, v, gate_0, gate_1, gate_2, initial_state, bounds, operator, causal, output_final_state, *rest):  # type: ignore[no-untyped-def]
    from longspan.ops.variants import VARIANTS

    o, final_state = k.new_empty(0), k.new_empty(0)
    if q is not None:
        o = v.new_empty(*v.shape[:2], *v.shape[-2:])
    if output_final_state:
        rows = k.shape[0] if bounds is None else bounds.shape[0] - 1
        # Gates of slots are the first that there are.
        num_slots = 0 if gate_0 is None else gate_0.shape[-1]
        size = VARIANTS[operator].state_size(k.shape[-1], v.shape[-1], num_slots)
        final_state = k.new_empty(rows, v.shape[-2], *size, dtype=accumulation_dtype(k.dtype))
    return o, final_state


LINEAR = OpaqueOperator(
    "longspan::linear",
    "Tensor? q, Tensor k, Tensor v, Tensor? gate_0, Tensor? gate_1, Tensor? gate_2, Tensor? initial_state, Tensor? bounds, "
    "str operator, bool causal, bool output_final_state, float? scale, str? backend, int? chunk_size, bool has_safe_gates",
    2,
    _linear,
    _linear_fake,
)


@dataclass
class OpaqueMemory(StepMemory):
    """What `write_linear` returns for calls without values: all is computed where it is read."""

    _k: Tensor
    _v: Tensor
    _gates: Sequence[Tensor | None]
    _initial_state: Tensor | None
    _bounds: Tensor | None
    _operator: str
    _causal: bool
    _output_final_state: bool
    _backend: str
    _chunk_size: int | None
    _has_safe_gates: bool
    _layout: SequenceLayout | None
    _final_state: Tensor | None = None

    def read(self, q: Tensor, scale: float | None = None) -> Tensor:
        """As in `LinearMemory`."""
        from longspan.attention.linear import check_query

        q = as_written(q, self._k)
        return self._call(q, check_query(self._operator, q, self._k, scale))

    def read_overlapped(self, q: Tensor, scale: float | None = None) -> Tensor:
        """As in `LinearMemory`."""
        return self.read(q, scale)

    def final_state(self) -> Tensor:
        """As in `LinearMemory`."""
        if not self._output_final_state:
            raise InputError(
                f"{self._operator}: final_state() needs a memory that keeps it; this one was written with "
                "output_final_state=False. Write it with output_final_state=True"
            )
        if self._final_state is None:
            self._call(None, None)
        assert self._final_state is not None
        return self._final_state

    def _call(self, q: Tensor | None, scale: float | None) -> Tensor:
        # The first call gives the final state, too.
        with_final = self._output_final_state and self._final_state is None
        o: Tensor
        o, final_state = LINEAR(
            q, self._k, self._v, *self._gates, self._initial_state, self._bounds,
            self._operator, self._causal, with_final, scale, self._backend, self._chunk_size,
            self._has_safe_gates,
        )  # fmt: skip
        if with_final:
            self._final_state = state_of_last(final_state, self._layout)
        return o


def write_opaque(
    variant: Variant,
    k: Tensor,
    v: Tensor,
    gates: Mapping[str, Tensor],
    initial_state: Tensor | None,
    output_final_state: bool,
    layout: SequenceLayout | None,
    backend: str,
    chunk_size: int | None,
    has_safe_gates: bool = False,
    causal: bool = True,
) -> OpaqueMemory:
    """The write phase of a call without values, whose arguments have been checked."""
    if len(variant.gates) > MAX_GATES:
        raise InputError(
            f"{variant.name}: a compiled operator takes up to {MAX_GATES} gates; it has {len(variant.gates)}"
        )
    given: list[Tensor | None] = [gates[gate.name] for gate in variant.gates]
    given += [None] * (MAX_GATES - len(given))
    return OpaqueMemory(
        k,
        v,
        given,
        states_of_documents(initial_state, layout),
        bounds_of(layout, k),
        variant.name,
        causal,
        output_final_state,
        backend,
        chunk_size,
        has_safe_gates,
        layout,
    )


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    bounds: Tensor | None,
    activation: str | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor]:
    """y, and the final state (empty where it is not wanted)."""
    from longspan.attention.convolution import causal_conv1d

    found = causal_conv1d(
        x, weight, bias, activation, layout_of(x, bounds),
        initial_state=initial_state, output_final_state=output_final_state, backend="torch",
    )  # fmt: skip
    return found if isinstance(found, tuple) else (found, x.new_empty(0))


def _convolution_fake(x, weight, bias, initial_state, bounds, activation, output_final_state):  # type: ignore[no-untyped-def]
    final_state = x.new_empty(0)
    if output_final_state:
        rows = x.shape[0] if bounds is None else bounds.shape[0] - 1
        final_state = x.new_empty(rows, weight.shape[1] - 1, x.shape[2])
    return x.new_empty(x.shape), final_state


CONVOLUTION = OpaqueOperator(
    "longspan::convolution",
    "Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? bounds, str? activation, bool output_final_state",
    2,
    _convolution,
    _convolution_fake,
)


def _shift_without_values(
    x: Tensor, initial_state: Tensor | None, bounds: Tensor | None, output_final_state: bool
) -> tuple[Tensor, Tensor]:
    """y, and the final state (empty where it is not wanted)."""
    from longspan.attention.shift import token_shift

    found = token_shift(
        x, initial_state=initial_state, output_final_state=output_final_state, layout=layout_of(x, bounds)
    )
    return found if isinstance(found, tuple) else (found, x.new_empty(0))


def _shift_fake(x, initial_state, bounds, output_final_state):  # type: ignore[no-untyped-def]
    final_state = x.new_empty(0)
    if output_final_state:
        final_state = x.new_empty(x.shape[0] if bounds is None else bounds.shape[0] - 1, x.shape[2])
    return x.new_empty(x.shape), final_state


SHIFT = OpaqueOperator(
    "longspan::shift",
    "Tensor x, Tensor? initial_state, Tensor? bounds, bool output_final_state",
    2,
    _shift_without_values,
    _shift_fake,
)


def _selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    bounds: Tensor | None,
    delta_softplus: bool,
    output_final_state: bool,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    """o, and the final state (empty where it is not wanted)."""
    from longspan.attention.selective_scan import selective_scan

    found = selective_scan(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state=initial_state,
        output_final_state=output_final_state, layout=layout_of(u, bounds), backend="torch", chunk_size=chunk_size,
    )  # fmt: skip
    return found if isinstance(found, tuple) else (found, u.new_empty(0))


def _selective_scan_fake(u, delta, A, B, C, D, z, bias, initial, bounds, softplus, with_final, *rest):  # type: ignore[no-untyped-def]
    final_state = u.new_empty(0)
    if with_final:
        rows = u.shape[0] if bounds is None else bounds.shape[0] - 1
        final_state = u.new_empty(rows, *A.shape, dtype=accumulation_dtype(u.dtype))
    return u.new_empty(u.shape), final_state


SELECTIVE_SCAN = OpaqueOperator(
    "longspan::selective_scan",
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, Tensor? initial_state, "
    "Tensor? bounds, bool delta_softplus, bool output_final_state, int? chunk_size",
    2,
    _selective_scan,
    _selective_scan_fake,
)
