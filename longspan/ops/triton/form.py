"""The chunk form of diagonal transitions by kernels: the phases of `custom_operators` behind the common interface."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longspan.errors import InputError
from longspan.layout import SequenceLayout
from longspan.layout.rows import take_rows
from longspan.ops.backends import MAX_HEAD_SIZE, TRITON_CHUNK_SIZES, require_gpu
from longspan.ops.decay.carried import carried_final_states, diagonal_transition
from longspan.ops.gates import DecayKind, LogDecays
from longspan.ops.triton.custom_operators import decay_read, decay_write
from longspan.ops.triton.launch import contiguous_rows, interpreted
from longspan.ops.triton.stretches import Stretches, stretch_length, stretches_of
from longspan.ops.variants.variant import ChunkForm, SecondPass
from longspan.state import Transition


def kernel_chunk_size(of_channels: bool, head_size: int, dtype: torch.dtype) -> int:
    """Tokens in a chunk where the caller does not say: as many as leave the state of a large head its registers.

    of_channels: where every key channel has its own decay, scores cost a product for each halving of the chunk.
    """
    if head_size > 128:
        return 16 if dtype == torch.float32 else 32
    return 32 if of_channels else 64


def prepare_kernels(
    decays: LogDecays,
    k: Tensor,
    v: Tensor,
    layout: SequenceLayout,
    chunk_size: int | None,
) -> TritonChunkForm:
    """Begin a call on the tokens that `layout` gives this rank; k ``[B, T, H_k, K]``, v ``[B, T, H, V]``.

    Raises:
        InputError: for a device, dtype, head size or chunk size that the kernels do not take.
    """
    _check_kernels_take(k, v, chunk_size)
    size = chunk_size or kernel_chunk_size(decays.kind is DecayKind.CHANNEL, max(k.shape[3], v.shape[3]), k.dtype)
    num_programs = v.shape[0] * v.shape[2] * -(-v.shape[3] // 64)
    length = max(size, stretch_length(layout, num_programs, _num_processors(k.device)))
    return TritonChunkForm(decays, layout, size, length, k.device)


def _check_kernels_take(k: Tensor, v: Tensor, chunk_size: int | None) -> None:
    require_gpu("triton", k.device, interpreted())
    if max(k.shape[3], v.shape[3]) > MAX_HEAD_SIZE:
        raise InputError(
            f"backend='triton' takes head sizes up to {MAX_HEAD_SIZE}; got K = {k.shape[3]} and V = {v.shape[3]}. "
            "Use more heads, or backend='torch'"
        )
    if chunk_size is not None and chunk_size not in TRITON_CHUNK_SIZES:
        raise InputError(
            f"backend='triton' takes a chunk_size of {', '.join(map(str, TRITON_CHUNK_SIZES))}; got {chunk_size}"
        )


def _num_processors(device: torch.device) -> int:
    """Multiprocessors of a GPU. The interpreter has one, but takes the shortest stretches, as nothing is gained by longer ones."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2**31


@dataclass(frozen=True)
class _WrittenByKernels:
    """What `decay_write` returned, with the inputs that read needs once more."""

    k: Tensor
    v: Tensor
    states: Tensor | None
    ends: Tensor
    totals: Tensor
    sums: Tensor
    tickets: tuple[Tensor | None, ...]


_NO_TICKETS = (None,) * 5


@dataclass
class TritonChunkForm(ChunkForm):
    """The chunk form by kernels."""

    decays: LogDecays
    layout: SequenceLayout
    chunk_size: int
    length: int
    device: torch.device
    _stretches: Stretches | None = None
    _written: _WrittenByKernels | None = None

    @property
    def _g(self) -> Tensor | None:
        g = self.decays.in_time
        return None if g is None else contiguous_rows(g)

    @property
    def _log_decay(self) -> Tensor | None:
        return self.decays.on(self.layout, self.device).constant

    def write(
        self, k: Tensor, v: Tensor, start_states: Tensor | None, end_pieces: Sequence[int], sent_pieces: Sequence[int]
    ) -> Tensor:
        stretches = stretches_of(self.layout, self.length, tuple(end_pieces), k.device)
        k, v = contiguous_rows(k), contiguous_rows(v)
        start_states = None if start_states is None else start_states.contiguous()
        is_plain = start_states is None and not end_pieces and stretches.is_one_a_piece
        states, ends, totals, sums, *tickets = decay_write(
            k, v, self._g, self._log_decay, start_states,
            stretches.table, stretches.pieces, stretches.starting, stretches.num_slots, stretches.num_ends, self.chunk_size,
            is_plain,
        )  # fmt: skip
        self._stretches = stretches
        self._written = _WrittenByKernels(k, v, None if is_plain else states, ends, totals, sums, tuple(tickets))
        return ends

    def read(self, q: Tensor, wait: Callable[[], Tensor | None], scale: float, overlapped: bool) -> Tensor:
        written = self._written
        assert written is not None
        q = contiguous_rows(q)
        # The first read takes the tickets.
        self._written = replace(written, tickets=_NO_TICKETS)
        if not overlapped:
            return self._read(q, written, True, wait(), scale)
        own = self._read(q, written, True, None, scale)
        arriving = wait()
        return own if arriving is None else own + self._read(q, self._written, False, arriving, scale)

    def _read(self, q: Tensor, written: _WrittenByKernels, own: bool, arriving: Tensor | None, scale: float) -> Tensor:
        """Read what this rank's own tokens wrote, or what arrives, or both."""
        stretches = self._stretches
        assert stretches is not None
        arriving = None if arriving is None else arriving.contiguous()
        k, v, states = (written.k, written.v, written.states) if own else (None, None, None)
        o: Tensor = decay_read(
            q, k, v, self._g, self._log_decay, states, arriving, written.totals, written.sums,
            *(written.tickets if own else _NO_TICKETS), stretches.table, stretches.pieces,
            scale, written.v.shape[2], written.v.shape[3], self.chunk_size,
        )  # fmt: skip
        return o

    @property
    def second_pass(self) -> SecondPass | None:
        return SecondPass(self.chunk_size, num_launches=3)

    def final_states(self, pieces: Sequence[int], rows: Sequence[int], incoming: Tensor | None) -> Tensor:
        assert self._written is not None
        own = take_rows(self._written.ends, rows, self.layout)
        return carried_final_states(own, [self.layout.pieces[number] for number in pieces], incoming, self.transition)

    def transition(self, ranges: Sequence[tuple[int, int]]) -> Transition:
        return diagonal_transition(self.decays, ranges, torch.float32, self.device)
