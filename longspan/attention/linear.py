"""Linear attention over the ranks of a layout: operators, exchange and layout joined.

Shapes: B batch rows, T this rank's tokens (all tokens without a layout), H heads of v, H_k heads of q and k (H a multiple of
H_k), K key size, V value size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from longspan.attention.memory import StepMemory
from longspan.attention.opaque import OpaqueMemory, write_opaque
from longspan.autocast import as_in_product, as_written, without_autocast
from longspan.checks import (
    Unchanged,
    check_count,
    check_flag,
    check_not_empty,
    check_same_device,
    check_scale,
    check_tensor,
    check_tensors,
)
from longspan.comm.profiling import named_range
from longspan.dtypes import accumulation_dtype
from longspan.errors import InputError
from longspan.exchange import (
    Exchanger,
    PendingExchange,
    exchange_named,
    start_exchange,
)
from longspan.exchange.all_reduce import sum_over_ranks
from longspan.first_order import first_order
from longspan.layout import SequenceLayout
from longspan.layout.calls import check_layout, check_packed, layout_of_one_device, stops_graphs
from longspan.layout.rows import index_on, take_rows
from longspan.ops.backends import resolve_backend
from longspan.ops.gates import Gate
from longspan.ops.variants import VARIANTS, Variant
from longspan.ops.variants.variant import ChunkForm, SecondPass
from longspan.plan import Reading, overlap_pays
from longspan.state import Pair, Transition
from longspan.tracing import breaks_graphs, has_no_values, outside_graphs, unseen_by_checkpointing


@dataclass
class LinearMemory(StepMemory):
    """What `write_linear` has written: read it with queries, once or several times."""

    _name: str
    _form: ChunkForm
    _layout: SequenceLayout
    _k: Tensor
    _pending: PendingExchange | None
    _ends: EndRows
    _written: Unchanged
    _is_traced: bool
    _incoming: Tensor | None = None
    _final_state: Tensor | None = None
    _with_gradients: bool = field(default_factory=torch.is_grad_enabled)

    def read(self, q: Tensor, scale: float | None = None) -> Tensor:
        """What the tokens read: ``o_t = scale · S_tᵀ q_t``.

        Args:
            q: ``[B, T, H_k, K]``, the shape and dtype of k.
            scale: a number; None is K^-½.

        Returns:
            o ``[B, T, H, V]``.

        Raises:
            InputError: for a q or a scale that does not fit, or where k, v or a gate was changed in place since it was written.

        The first read waits for the exchange.
        """
        return (_read_linear_outside_graphs if self._breaks_graphs() else LinearMemory._read)(self, q, scale, False)

    def read_overlapped(self, q: Tensor, scale: float | None = None) -> Tensor:
        """`read`, in LASP-2's own schedule: what tokens read inside their chunks is computed before the exchange is waited for."""
        return (_read_linear_outside_graphs if self._breaks_graphs() else LinearMemory._read)(self, q, scale, True)

    def overlap_pays(self) -> bool:
        """Whether `read_overlapped` is faster than `read` by the model, as every rank finds alike; asked before the first read."""
        second = self._form.second_pass
        if self._pending is None or second is None:
            return False
        asked = _overlap_pays_outside_graphs if self._breaks_graphs() else LinearMemory._overlap_pays
        return asked(self, self._pending, second)

    def _overlap_pays(self, pending: PendingExchange, second: SecondPass) -> bool:
        cost, cluster = pending.modelled()
        _, batch, num_heads, key_size, value_size = pending.shape
        reading = Reading(
            num_tokens=max(self._layout.tokens_of),
            chunk_size=second.chunk_size,
            num_rows=batch * num_heads,
            key_size=key_size,
            value_size=value_size,
            number_bytes=accumulation_dtype(self._k.dtype).itemsize,
            num_launches=second.num_launches,
        )
        return overlap_pays(cost, cluster, reading, self._with_gradients)

    def _breaks_graphs(self) -> bool:
        """Whether a compiler traces this call, and not the one that wrote this memory."""
        return not self._is_traced and breaks_graphs()

    @unseen_by_checkpointing
    def _read(self, q: Tensor, scale: float | None, overlapped: bool) -> Tensor:
        q = as_written(q, self._k)
        factor = check_query(self._name, q, self._k, scale)
        self._written.check()
        with profiled("longspan.read", q):
            o = self._form.read(q, lambda: self.incoming(q), factor, overlapped)
        if self._ends.with_final_states and self._layout.num_ranks > 1:
            # A rank whose loss takes o alone runs the final states' collectives backward, too, as one that takes them does.
            o = _After.apply(o, self.final_state())
        return o

    def incoming(self, q: Tensor | None = None) -> Tensor | None:
        """The state that enters each of this rank's segments ``[num_segments, B, H, K, V]``, or None on one rank; waits for it.

        q: what is about to read it. Where it takes a gradient, this rank takes part in the backward exchange.
        """
        if self._pending is not None:
            joins = q is not None and q.requires_grad and self._with_gradients
            # A first read without gradients must not cut off those of later ones.
            with without_autocast(self._k), torch.set_grad_enabled(self._with_gradients):
                self._incoming = self._pending.wait(joins)
            self._pending = None
        return self._incoming

    def final_state(self) -> Tensor:
        """The state after the last token, ``[B, H, K, V]``, or of each document, ``[num_documents, H, K, V]``, on every rank.

        Of a layout that `continues` a sequence it is the last document's alone, ``[B, H, K, V]``. Its gradient is the sum of what
        every rank sends back. float32 (float64 for float64 inputs). Where the layout has several ranks the first read takes part
        in its collective already: ranks may let o, the final state or both enter their losses.
        """
        if self._breaks_graphs():
            return _final_linear_state_outside_graphs(self)
        if not self._ends.with_final_states:
            raise InputError(
                f"{self._name}: final_state() needs a memory that keeps it; this one was written with output_final_state=False. "
                "Write it with output_final_state=True"
            )
        self._written.check()
        if self._layout.num_ranks == 1:
            return self._find_final_state()
        if self._final_state is None:
            with torch.set_grad_enabled(self._with_gradients):
                self._final_state = self._find_final_state()
        return self._final_state if torch.is_grad_enabled() else self._final_state.detach()

    @unseen_by_checkpointing
    def _find_final_state(self) -> Tensor:
        layout, ends = self._layout, self._ends
        incoming = self.incoming()
        with profiled("longspan.final_state", self._k):
            states = self._form.final_states(ends.final_pieces, ends.final_rows, incoming)
        if layout.num_ranks > 1:
            states = gather_states(states, ends.final_states, layout)
        return states.squeeze(1) if layout.has_document_states else states.squeeze(0)


_overlap_pays_outside_graphs = outside_graphs(LinearMemory._overlap_pays)
_read_linear_outside_graphs = outside_graphs(LinearMemory._read)
_final_linear_state_outside_graphs = outside_graphs(LinearMemory.final_state)


class _After(torch.autograd.Function):
    """An output whose backward is also that of another.

    | | shape | |
    |---|---|---|
    | x | any | returned as it is |
    | other | any | takes no gradient from here, but the nodes that made it run backward |
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, other: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


@contextmanager
def profiled(name: str, x: Tensor) -> Iterator[None]:
    """A named stretch of a profile, without autocast, which would put float32 states through bfloat16 products."""
    with named_range(name), without_autocast(x):
        yield


def check_query(name: str, q: Tensor, k: Tensor, scale: float | None) -> float:
    """Raise InputError unless q has the shape, dtype and device of k; returns the scale, K^-½ for None. `name` is the operator."""
    check_tensor(name, "q", q)
    check_not_empty(name, "q", q)
    # Of keys with several steps a token, [B, T, N, H_k, K], a query reads after the last.
    shape = (*k.shape[:2], *k.shape[3:]) if k.dim() == 5 else k.shape
    if q.shape != shape or q.dtype != k.dtype:
        raise InputError(
            f"{name}: q must have the shape and dtype of k{' without its steps' if k.dim() == 5 else ''}, {tuple(shape)} and "
            f"{k.dtype}; got {tuple(q.shape)} and {q.dtype}. Convert it with q.to(k.dtype)"
        )
    check_same_device(name, k=k, q=q)
    return check_scale(name, scale, q.shape[-1] ** -0.5)


@dataclass(frozen=True)
class EndRows:
    """Which end states a call asks of the write phase, and what they are for.

    pieces: piece numbers asked for, in order. sent_pieces: those whose end state another segment receives. segment_rows: for each
    segment the row of its last piece, or None if it is empty. final_pieces, final_rows, final_states: pieces that end a
    document whose state is a final one, their rows, which of the final states they are.
    """

    with_final_states: bool
    pieces: tuple[int, ...]
    sent_pieces: tuple[int, ...]
    segment_rows: tuple[int | None, ...]
    final_pieces: tuple[int, ...]
    final_rows: tuple[int, ...]
    final_states: tuple[int, ...]


def end_rows(layout: SequenceLayout, with_final_states: bool) -> EndRows:
    """Of this rank's pieces, what other ranks receive, and, `with_final_states`, what documents end with."""
    last_of_segment: list[int | None] = [None] * layout.num_segments
    final = []
    for number, piece in enumerate(layout.pieces):
        last_of_segment[piece.segment] = number
        if with_final_states and piece.ends_document and piece.document >= layout.num_documents - layout.num_states:
            final.append(number)
    asked = set(final)
    if layout.num_ranks > 1:
        asked.update(number for number in last_of_segment if number is not None)
    pieces = tuple(sorted(asked))
    row = {number: index for index, number in enumerate(pieces)}
    return EndRows(
        with_final_states=with_final_states,
        pieces=pieces,
        sent_pieces=_sent_pieces(layout, last_of_segment),
        segment_rows=tuple(None if number is None else row.get(number) for number in last_of_segment),
        final_pieces=tuple(final),
        final_rows=tuple(row[number] for number in final),
        final_states=tuple(layout.pieces[n].document - layout.num_documents + layout.num_states for n in final),
    )


def _sent_pieces(layout: SequenceLayout, last_of_segment: list[int | None]) -> tuple[int, ...]:
    """The last pieces of this rank's segments, but of the sequence's last segment: nothing comes after it."""
    if layout.num_ranks == 1:
        return ()
    sent = []
    for (_, stop), number in zip(layout.segments, last_of_segment, strict=True):
        if number is not None and stop < layout.seq_len:
            sent.append(number)
    return tuple(sent)


Given = Mapping[str, Tensor | Sequence[float]]
"""Gates as a user gives them: tensors, and numbers for constants."""


def tensors_of(variant: Variant, given: Given) -> Mapping[str, Tensor]:
    """`given`, with constants that are numbers as tensors on the CPU, float64."""
    constants = {gate.name for gate in variant.gates if not gate.differentiable}
    gates: dict[str, Any] = {}
    for name, x in given.items():
        if name in constants and isinstance(x, list | tuple):
            try:
                x = torch.tensor(x, dtype=torch.float64, device="cpu")
            except (TypeError, ValueError) as error:
                raise InputError(
                    f"{variant.name}: {name} must be numbers, one per head, or a tensor; got {x!r}. Pass a list of floats"
                ) from error
        gates[name] = x
    return gates


def write_linear(
    operator: str,
    k: Tensor,
    v: Tensor,
    given: Given,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    layout: SequenceLayout | None = None,
    exchange: str | Exchanger = "auto",
    backend: str | None = None,
    chunk_size: int | None = None,
    has_safe_gates: bool = False,
) -> LinearMemory | OpaqueMemory:
    """Compute the states that this rank's tokens write and start their exchange, without waiting for it; see `longspan.write`.

    `has_safe_gates` says that log decays cannot exceed 0 by how they were made, and need no look. A NaN among them, which a
    diverging model makes on some ranks, is then one in the outputs, where every rank comes to know of it.
    """
    if stops_graphs(layout):
        return _write_linear_outside_graphs(
            operator, k, v, given, initial_state=initial_state, output_final_state=output_final_state, layout=layout,
            exchange=exchange, backend=backend, chunk_size=chunk_size, has_safe_gates=has_safe_gates,
        )  # fmt: skip
    variant = VARIANTS[operator]
    k, v = as_in_product(k), as_in_product(v)
    gates = tensors_of(variant, given)
    exchanger = exchange_named(exchange)
    check_flag(operator, "output_final_state", output_final_state)
    layout, backend = check_inputs(variant, k, v, gates, initial_state, layout, backend, chunk_size, has_safe_gates)
    # A compiler traces kernels as they are: they have operators of their own.
    if has_no_values(k) and (backend == "torch" or not torch.compiler.is_compiling()):
        return write_opaque(
            variant, k, v, gates, initial_state, output_final_state, layout, backend, chunk_size, has_safe_gates
        )
    return _write_linear(
        variant, exchanger, k, v, gates, initial_state, output_final_state, layout, backend, chunk_size
    )


_write_linear_outside_graphs = outside_graphs(write_linear)


@unseen_by_checkpointing
def _write_linear(
    variant: Variant,
    exchange: Exchanger,
    k: Tensor,
    v: Tensor,
    gates: Mapping[str, Tensor],
    initial_state: Tensor | None,
    output_final_state: bool,
    layout: SequenceLayout,
    backend: str,
    chunk_size: int | None,
) -> LinearMemory:
    written = Unchanged(variant.name, k=k, v=v, **gates)
    ends = layout.cached(("end_rows", output_final_state), lambda: end_rows(layout, output_final_state))
    pending = None
    with profiled("longspan.write", k):
        form = variant.prepare(k, v, gates, layout, chunk_size, backend)
        end_states = form.write(k, v, start_states_of(initial_state, layout), ends.pieces, ends.sent_pieces)
        if layout.num_ranks > 1:
            pending = _start(exchange, variant, form, end_states, ends, layout)
    return LinearMemory(variant.name, form, layout, k, pending, ends, written, torch.compiler.is_compiling())


def start_states_of(initial_state: Tensor | None, layout: SequenceLayout) -> Tensor | None:
    """Rows of the initial state for the pieces of this rank that start a document, ``[n, B, H, K, V]``."""
    if initial_state is None or layout.continues == 0:
        return None
    started = [piece.document for piece in layout.pieces if piece.starts_document]
    if layout.has_document_states:
        return take_rows(initial_state.unsqueeze(1), started, layout)
    # That of the first document; the others begin from nothing.
    own = initial_state.unsqueeze(0)[: started.count(0)]
    nothing = initial_state.new_zeros(len(started) - len(own), *initial_state.shape)
    return torch.cat([own, nothing])


def _start(
    exchange: Exchanger,
    variant: Variant,
    form: ChunkForm,
    end_states: Tensor,
    ends: EndRows,
    layout: SequenceLayout,
) -> PendingExchange:
    """Launch the exchange of this rank's segments' pairs."""
    if all(row is not None for row in ends.segment_rows):
        states = take_rows(end_states, [row for row in ends.segment_rows if row is not None], layout)
    else:
        nothing = torch.zeros_like(end_states[0])
        states = torch.stack([nothing if row is None else end_states[row] for row in ends.segment_rows])
    return start_exchange(exchange, Pair(_segment_transitions(variant, form, layout), states), layout)


def _segment_transitions(variant: Variant, form: ChunkForm, layout: SequenceLayout) -> Transition:
    """Transitions of this rank's segments, or of all segments where every rank knows them; zero where a document starts."""
    if variant.transition.is_known:
        ranges = [(segment.start, segment.stop) for segment in layout.all_segments]
        cut = [segment.starts_document for segment in layout.all_segments]
    else:
        ranges, local = [], 0
        for start, stop in layout.segments:
            ranges.append((local, local + stop - start))
            local += stop - start
        cut = [layout.all_segments[number].starts_document for number in layout.own_segments]
    transition = form.transition(ranges)
    return transition.cut(cut)


def check_inputs(
    variant: Variant,
    k: Tensor,
    v: Tensor,
    gates: Mapping[str, Tensor],
    initial_state: Tensor | None,
    layout: SequenceLayout | None,
    backend: str | None,
    chunk_size: int | None,
    has_safe_gates: bool = False,
) -> tuple[SequenceLayout, str]:
    """Refuse what does not fit, before the first collective; returns the layout, and the backend that computes."""
    name = variant.name
    if chunk_size is not None:
        check_count(name, "chunk_size", chunk_size, "the tokens that are computed together, or None")
    check_tensors(name, k=k, v=v)
    _check_dimensions(variant, k, v)
    check_not_empty(name, "k", k)
    check_not_empty(name, "v", v)
    check_same_device(name, k=k, v=v)
    backend = resolve_backend(name, variant.backends, k, v, backend, chunk_size)
    layout = layout_of_one_device(k.shape[1]) if layout is None else layout
    check_layout(layout, k.shape[1], name, sends=not has_no_values(k))
    (batch, num_tokens), (num_key_heads, key_size) = k.shape[:2], k.shape[-2:]
    num_heads, value_size = v.shape[-2:]
    if num_heads % num_key_heads:
        raise InputError(
            f"{name}: the {num_heads} heads of v must be a multiple of the {num_key_heads} heads of q and k. Repeat the heads of "
            "v, or give q and k fewer"
        )
    check_packed(name, k, layout)
    sizes = {"B": batch, "T": num_tokens, "N": k.shape[2], "H": num_heads, "K": key_size}
    if variant.has_slots:
        check_tensors(name, **gates)
        sizes["M"] = variant.num_slots(gates)
    _check_gates(variant, gates, sizes, layout, k, has_safe_gates)
    if initial_state is not None:
        check_tensor(name, "initial_state", initial_state)
        rows = layout.num_documents if layout.has_document_states else batch
        expected = (rows, num_heads, *variant.state_size(key_size, value_size, sizes.get("M", 0)))
        dtype = accumulation_dtype(k.dtype)
        if tuple(initial_state.shape) != expected or initial_state.dtype != dtype:
            first = "num_documents" if layout.has_document_states else "B"
            last = "M, K + V" if variant.has_slots else "K, V"
            raise InputError(
                f"{name}: initial_state must be [{first}, H, {last}] = {expected} in {dtype}; got "
                f"{tuple(initial_state.shape)} in {initial_state.dtype}. Convert it with initial_state.to({dtype})"
            )
        check_same_device(name, k=k, initial_state=initial_state)
    return layout, backend


def _check_dimensions(variant: Variant, k: Tensor, v: Tensor) -> None:
    """Raise InputError unless k and v have the dimensions of the variant's, and the same rows, tokens and steps."""
    same = 3 if variant.has_steps else 2
    if k.dim() == v.dim() == same + 2 and k.shape[:same] == v.shape[:same]:
        return
    if variant.has_steps:
        raise InputError(
            f"{variant.name} takes k [B, T, N, H_k, K] and v [B, T, N, H, V] with the same B, T and N, the steps of a token; got "
            f"{tuple(k.shape)} and {tuple(v.shape)}. Steps are a dimension of their own: k.unflatten(-1, (N, H_k, K))"
        )
    raise InputError(
        f"{variant.name} takes k [B, T, H_k, K] and v [B, T, H, V] with the same B and T; got {tuple(k.shape)} and "
        f"{tuple(v.shape)}. Heads are a dimension of their own: k.unflatten(-1, (H_k, K))"
    )


def _check_gates(
    variant: Variant,
    gates: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    layout: SequenceLayout,
    k: Tensor,
    has_safe_gates: bool,
) -> None:
    expected_names = [gate.name for gate in variant.gates]
    if sorted(gates) != sorted(expected_names):
        raise InputError(
            f"{variant.name} takes {', '.join(expected_names) or 'no gates'} beside q, k and v; got {sorted(gates)}. Pass just "
            "these by name"
        )
    for gate in variant.gates:
        _check_gate(variant, gate, gates[gate.name], sizes, layout, k, has_safe_gates)


def _check_gate(
    variant: Variant, gate: Gate, x: Tensor, sizes: Mapping[str, int], layout: SequenceLayout, k: Tensor, is_safe: bool
) -> None:
    check_tensors(variant.name, **{gate.name: x})
    expected = tuple(sizes[dim] for dim in gate.dims)
    if tuple(x.shape) != expected:
        raise InputError(
            f"{variant.name}: {gate.name} must be a floating-point tensor [{', '.join(gate.dims)}] = {expected}; got "
            f"{x.dtype} of shape {tuple(x.shape)}. Expand what is the same for several, as with {gate.name}.expand{expected}"
        )
    check_not_empty(variant.name, gate.name, x)
    if gate.differentiable or x.device.type != "cpu":
        check_same_device(variant.name, **{"k": k, gate.name: x})
    if not gate.differentiable and x.requires_grad:
        raise InputError(
            f"{variant.name}: {gate.name} is a constant and takes no gradient; got one that requires it. Pass "
            f"{gate.name}.detach(), or use an operator whose decay is learned, such as simple_gla"
        )
    # On other devices the check would make the host wait; a compiler does not see values.
    readable = not is_safe and x.device.type == "cpu" and x.numel() and not has_no_values(x)
    if gate.is_log_decay and readable and not bool(x.detach().amax() <= 0):
        raise InputError(
            f"{variant.name}: {gate.name} holds logarithms of decays and must not exceed 0 or be NaN; its largest value on rank "
            f"{layout.rank} is {float(x.detach().amax()):g}. Use for example torch.nn.functional.logsigmoid"
        )


def gather_states(states: Tensor, numbers: Sequence[int], layout: SequenceLayout) -> Tensor:
    """All final states ``[num_states, B, H, K, V]`` on every rank, from those whose tokens end on each."""
    index = index_on(layout, numbers, states.device)
    everyone = states.new_zeros(layout.num_states, *states.shape[1:]).index_copy(0, index, states)
    return sum_over_ranks(everyone, layout)
