"""The chunk form of the delta rule by the kernels of flash-linear-attention: our exchange around its public functions.

Shapes: B batch rows, T tokens of this rank, H heads of v, H_k heads of q and k, K key size, V value size, P pieces.

Its chunk functions take an initial and give a final state, and differentiate both, which is all that an exchange needs. As the
recurrence is linear in the values and the initial state together, one call with values ``[v, 0]`` of V + K columns and the
initial state ``[0, I]`` ends in ``[U, A]``: what the piece writes from zero, and its transition. So

    write    one call over the pieces that other ranks wait for, with ``[v, 0]``        (none on one rank)
      ... the exchange ...
    read     one call over all pieces, with the states that truly enter them            (also gives the final states)

and autograd goes through both by the library's own backward: the second call's gradients, and with what the exchange brings
those of ``[U, A]``. A sent piece is thus gone through twice, in both directions.

Pieces become the sequences of one call by their bounds (``cu_seqlens``), rows of a batch laid one after another. The bounds are
made once per layout, on the device and on the CPU, so that no call waits for the device.

Functions and conventions are those of version 0.6: ``[B, T, H, ·]`` tensors, states ``[N, H, K, V]`` in float32, natural
logarithms of decays. `chunk_delta_rule` has as many heads of q and k as of v, and takes no float32. They leave `torch.compile`'s
graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from longspan.dtypes import accumulation_dtype
from longspan.errors import InputError
from longspan.first_order import first_order
from longspan.layout import SequenceLayout
from longspan.layout.rows import index_on, take_rows
from longspan.ops.backends import MAX_HEAD_SIZE, require_gpu, require_package
from longspan.ops.gates import DecayKind, Gates, LogDecays
from longspan.ops.variants.variant import ChunkForm, SecondPass
from longspan.state import Dense, Transition

_FUNCTIONS = {
    DecayKind.NONE: ("fla.ops.delta_rule", "chunk_delta_rule", (16, 32, 64)),
    DecayKind.TOKEN: ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule", (16, 32, 64)),
    DecayKind.CHANNEL: ("fla.ops.kda", "chunk_kda", (32, 64)),
}
"""By what decays: the module, the function, and the chunk sizes that it takes."""


def prepare_fla(
    name: str, k: Tensor, v: Tensor, decays: LogDecays, beta: Tensor, layout: SequenceLayout, chunk_size: int | None
) -> FlaChunkForm:
    """Begin a call of the variant `name` on the tokens that `layout` gives this rank; k ``[B, T, H_k, K]``, v ``[B, T, H, V]``.

    Raises:
        InputError: if the package is not installed; for a decay that none of its functions has; for a device, dtype, head size or
            chunk size that its function does not take.
    """
    if decays.kind not in _FUNCTIONS:
        raise InputError(
            f"{name}: backend='fla' has no delta rule with a decay of kind {decays.kind.name}; it has "
            f"{', '.join(kind.name for kind in _FUNCTIONS)}. Use backend='torch'"
        )
    module, function_name, chunk_sizes = _FUNCTIONS[decays.kind]
    require_package("fla", "fla", "pip install 'longspan[fla]', or use backend='torch'")
    from longspan.ops.triton.launch import LOWEST_KERNEL_LOG_DECAY, interpreted

    require_gpu("fla", k.device, interpreted())
    if decays.kind is DecayKind.NONE and k.dtype == torch.float32:
        raise InputError(
            f"{name} with backend='fla' takes bfloat16 or float16; got float32. Convert q, k and v, or use backend='torch'"
        )
    if k.shape[3] > MAX_HEAD_SIZE:
        raise InputError(
            f"backend='fla' takes keys of size up to {MAX_HEAD_SIZE}; got K = {k.shape[3]}. Use more heads, or backend='torch'"
        )
    if chunk_size is not None and chunk_size not in chunk_sizes:
        raise InputError(
            f"{name} with backend='fla' takes a chunk_size of {', '.join(map(str, chunk_sizes))}; got {chunk_size}"
        )
    function = getattr(import_module(module), function_name)
    gates = {"beta": beta}
    if decays.in_time is not None:
        # The functions take differences of sums of g: a decay to nothing would be NaN there.
        gates["g"] = decays.in_time.clamp(min=LOWEST_KERNEL_LOG_DECAY)
    return FlaChunkForm(_Call(function, gates, decays.kind is not DecayKind.NONE, chunk_size), layout)


@dataclass(frozen=True)
class _Sequences:
    """Pieces as the sequences of one call.

    spans: their local tokens ``[start, stop)``, ascending. is_all: they are all tokens of the rank. bounds: for several pieces
    int64 ``[B · pieces + 1]``, the bounds of the batch rows' pieces laid one after another, on the device and on the CPU; None for
    one piece, whose batch stays a batch.
    """

    spans: tuple[tuple[int, int], ...]
    is_all: bool
    bounds: tuple[Tensor, Tensor] | None

    @classmethod
    def of(cls, layout: SequenceLayout, pieces: Sequence[int], batch: int, device: torch.device) -> _Sequences:
        """Those of `pieces`, made once for a layout."""
        key = ("fla", tuple(pieces), batch, device)
        return layout.cached(key, lambda: cls._build(layout, pieces, batch, device))

    @classmethod
    def _build(cls, layout: SequenceLayout, pieces: Sequence[int], batch: int, device: torch.device) -> _Sequences:
        spans = tuple((layout.pieces[number].start, layout.pieces[number].stop) for number in pieces)
        bounds = None
        if len(spans) > 1:
            lengths = torch.tensor([stop - start for start, stop in spans]).repeat(batch)
            on_cpu = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
            bounds = (on_cpu.to(device), on_cpu)
        return cls(spans, len(spans) == len(layout.pieces), bounds)

    def take(self, x: Tensor) -> Tensor:
        """``x [B, T, ...]``, the sequences' tokens alone: ``[B, n, ...]``, or ``[1, B · n, ...]`` for several of them."""
        if not self.is_all:
            x = torch.cat([x[:, start:stop] for start, stop in self.spans], dim=1)
        return x if self.bounds is None else x.flatten(0, 1).unsqueeze(0)

    def states(self, states: Tensor) -> Tensor:
        """``[pieces, B, H, K, V]`` as one state a sequence, ``[N, H, K, V]``."""
        return states.transpose(0, 1).flatten(0, 1).contiguous()

    def by_piece(self, states: Tensor) -> Tensor:
        """``[N, H, K, V]`` as ``[pieces, B, H, K, V]``."""
        return states.unflatten(0, (-1, len(self.spans))).transpose(0, 1)


@dataclass(frozen=True)
class _Call:
    """A function of the library with the gates of one call, by its own names for them.

    shares_keys: it takes fewer heads of q and k than of v.
    """

    function: Callable[..., tuple[Tensor, Tensor | None]]
    gates: Gates
    shares_keys: bool
    chunk_size: int | None

    def __call__(
        self,
        sequences: _Sequences,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        initial: Tensor | None,
        output_final_state: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """o, for the tokens of `sequences` laid out as `_Sequences.take` does, and their final states ``[pieces, B, H, K, V]``.

        initial: ``[pieces, B, H, K, V]``, or None for zeros.
        """
        if not self.shares_keys and k.shape[2] != v.shape[2]:
            q, k = (x.repeat_interleave(v.shape[2] // k.shape[2], dim=2) for x in (q, k))
        options: dict[str, Any] = {} if self.chunk_size is None else {"chunk_size": self.chunk_size}
        if sequences.bounds is not None:
            options["cu_seqlens"], options["cu_seqlens_cpu"] = sequences.bounds
        o, final = self.function(
            q=sequences.take(q),
            k=sequences.take(k),
            v=sequences.take(v),
            scale=scale,
            initial_state=None if initial is None else sequences.states(initial),
            output_final_state=output_final_state,
            **{name: sequences.take(gate) for name, gate in self.gates.items()},
            **options,
        )
        return o, None if final is None else sequences.by_piece(final)


class _Nothing(torch.autograd.Function):
    """Zeros that take no gradient, but stand in the graph of the inputs: every rank's exchange has a backward.

    | | shape |
    |---|---|
    | inputs | any |
    | zeros | [B, H, K, V] |
    """

    @staticmethod
    def forward(ctx: Any, shape: tuple[int, ...], dtype: torch.dtype, *inputs: Tensor | None) -> Tensor:
        ctx.num_inputs = len(inputs)
        return next(x for x in inputs if x is not None).new_zeros(shape, dtype=dtype)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        return (None,) * (2 + ctx.num_inputs)


@dataclass(frozen=True)
class _GivenToWrite:
    """What write was given, for the later phases; nothing: zeros ``[B, H, K, V]``."""

    k: Tensor
    v: Tensor
    start_states: Tensor | None
    nothing: Tensor
    wants_finals: bool


class FlaChunkForm(ChunkForm):
    """The chunk form of the delta rule by flash-linear-attention."""

    def __init__(self, call: _Call, layout: SequenceLayout) -> None:
        self._call, self._layout = call, layout
        self._written: _GivenToWrite | None = None
        self._transitions: dict[tuple[int, int], Tensor] = {}
        self._finals: Tensor | None = None

    def write(
        self, k: Tensor, v: Tensor, start_states: Tensor | None, end_pieces: Sequence[int], sent_pieces: Sequence[int]
    ) -> Tensor:
        shape = (v.shape[0], v.shape[2], k.shape[3], v.shape[3])
        nothing: Tensor = _Nothing.apply(
            shape, accumulation_dtype(k.dtype), k, v, start_states, *self._call.gates.values()
        )
        wants_finals = any(self._layout.pieces[number].ends_document for number in end_pieces)
        self._written = _GivenToWrite(k, v, start_states, nothing, wants_finals)
        ends = self._write_sent(k, v, start_states, nothing, sent_pieces) if sent_pieces else {}
        rows = [ends.get(number, nothing) for number in end_pieces]
        return torch.stack(rows) if rows else nothing.unsqueeze(0)[:0]

    def _write_sent(
        self, k: Tensor, v: Tensor, start_states: Tensor | None, nothing: Tensor, sent_pieces: Sequence[int]
    ) -> dict[int, Tensor]:
        """The states that leave the sent pieces, by number; keeps the transitions of those that continue a document."""
        pieces = self._layout.pieces
        sequences = _Sequences.of(self._layout, sent_pieces, k.shape[0], k.device)
        initial = None if start_states is None else self._entering(start_states, None, sent_pieces)
        continues = any(not pieces[number].starts_document for number in sent_pieces)
        if continues:
            widened = torch.cat([v, v.new_zeros(*v.shape[:3], k.shape[3])], dim=-1)
            identity = torch.eye(k.shape[3], dtype=nothing.dtype, device=k.device)
            starts = nothing.expand(len(sent_pieces), *nothing.shape) if initial is None else initial
            initial = torch.cat([starts, identity.expand(*starts.shape[:-1], -1)], dim=-1)
        # Its output is not wanted: any queries do.
        _, finals = self._call(sequences, k.detach(), k, widened if continues else v, 1.0, initial, True)
        assert finals is not None
        written, transitions = finals.split([v.shape[3], finals.shape[-1] - v.shape[3]], dim=-1)
        for row, number in enumerate(sent_pieces):
            if not pieces[number].starts_document:
                self._transitions[pieces[number].start, pieces[number].stop] = transitions[row]
        return dict(zip(sent_pieces, written.unbind(0), strict=True))

    def transition(self, ranges: Sequence[tuple[int, int]]) -> Transition:
        assert self._written is not None
        nothing = self._written.nothing
        # A range of several pieces starts a document, a range of none changes nothing, and what is not sent is not asked for.
        identity = torch.eye(nothing.shape[2], dtype=nothing.dtype, device=nothing.device)
        identity = identity.expand(*nothing.shape[:2], -1, -1)
        return Dense(torch.stack([self._transitions.get((start, stop), identity) for start, stop in ranges]))

    @property
    def second_pass(self) -> SecondPass | None:
        return None

    def read(self, q: Tensor, wait: Callable[[], Tensor | None], scale: float, overlapped: bool) -> Tensor:
        written = self._written
        assert written is not None
        if not overlapped:
            return self._read(q, written.v, written.start_states, wait(), scale)
        own = self._read(q, written.v, written.start_states, None, scale)
        incoming = wait()
        if incoming is None:
            return own
        own_finals, self._finals = self._finals, None
        o = own + self._read(q, torch.zeros_like(written.v), None, incoming, scale)
        if own_finals is not None and self._finals is not None:
            self._finals = own_finals + self._finals
        return o

    def _read(self, q: Tensor, v: Tensor, start_states: Tensor | None, incoming: Tensor | None, scale: float) -> Tensor:
        """One call over all pieces: o ``[B, T, H, V]``; keeps the final states where they are wanted."""
        written = self._written
        assert written is not None
        numbers = range(len(self._layout.pieces))
        sequences = _Sequences.of(self._layout, numbers, v.shape[0], v.device)
        initial = None
        if start_states is not None or incoming is not None:
            initial = self._entering(start_states, incoming, numbers)
        o, finals = self._call(sequences, q, written.k, v, scale, initial, written.wants_finals)
        self._finals = finals
        return o.reshape(*v.shape[:2], *o.shape[2:])

    def _entering(self, start_states: Tensor | None, incoming: Tensor | None, numbers: Sequence[int]) -> Tensor:
        """The states that enter `numbers`, ``[len(numbers), B, H, K, V]``: start states, what arrives, or zero."""
        assert self._written is not None
        parts = [self._written.nothing.unsqueeze(0), *(x for x in (start_states, incoming) if x is not None)]
        rows: list[int] = []
        num_starts = 0
        first_incoming = 1 + (0 if start_states is None else len(start_states))
        for piece in self._layout.pieces:
            if piece.starts_document:
                rows.append(1 + num_starts if start_states is not None else 0)
                num_starts += 1
            else:
                rows.append(first_incoming + piece.segment if incoming is not None else 0)
        index = index_on(self._layout, [rows[number] for number in numbers], parts[0].device)
        return torch.cat(parts).index_select(0, index)

    def final_states(self, pieces: Sequence[int], rows: Sequence[int], incoming: Tensor | None) -> Tensor:
        written = self._written
        assert written is not None
        if not pieces:
            # No rows, but still a node: what follows has a backward on every rank.
            return written.nothing.unsqueeze(0)[:0]
        if self._finals is None:
            self._read(torch.zeros_like(written.k), written.v, written.start_states, incoming, 1.0)
        assert self._finals is not None
        return take_rows(self._finals, pieces, self._layout)
