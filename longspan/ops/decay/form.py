"""The chunk form of a decay, from its phases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longspan.dtypes import accumulation_dtype
from longspan.layout import SequenceLayout
from longspan.layout.rows import take_rows
from longspan.ops.backends import require_package
from longspan.ops.decay.call import DecayCall
from longspan.ops.decay.carried import carried_final_states, diagonal_transition
from longspan.ops.decay.factors import factors_of
from longspan.ops.decay.read import DecayRead
from longspan.ops.decay.write import DecayWrite
from longspan.ops.factor_variant import FactorVariant
from longspan.ops.gates import Gates, LogDecays
from longspan.ops.tiling import chunks_of_block, tile
from longspan.ops.variants.variant import ChunkForm, SecondPass
from longspan.state import Transition


@dataclass(frozen=True, kw_only=True)
class DecayVariant(FactorVariant):
    """A variant with a diagonal transition, described by its recurrent form and what decays."""

    backends: tuple[str, ...] = ("torch", "triton")

    def prepare(
        self, k: Tensor, v: Tensor, gates: Gates, layout: SequenceLayout, chunk_size: int | None, backend: str
    ) -> ChunkForm:
        if backend == "triton":
            require_package("triton", "triton", "pip install 'longspan[triton]'")
            from longspan.ops.triton.form import prepare_kernels

            return prepare_kernels(self.decay.of(gates), k, v, layout, chunk_size)
        num_heads = v.shape[2]
        size = chunk_size or default_chunk_size(k.dtype)
        tiling = tile(layout, size, chunks_of_block(k, v, size), k.device)
        states = accumulation_dtype(k.dtype)
        decays = self.decay.of(gates)
        factors = factors_of(decays.on(layout, k.device), tiling, num_heads, k.dtype, states)
        return DecayChunkForm(DecayCall(layout, tiling, factors, 1.0, num_heads, states), decays)


def default_chunk_size(dtype: torch.dtype) -> int:
    """Tokens in a chunk where the caller does not say."""
    return 128 if dtype == torch.bfloat16 else 64


@dataclass
class DecayChunkForm(ChunkForm):
    """The chunk form of a diagonal transition."""

    call: DecayCall
    decays: LogDecays
    _states: Tensor | None = None
    _ends: Tensor | None = None
    _inputs: tuple[Tensor, Tensor] | None = None

    @property
    def _g(self) -> Tensor | None:
        return self.decays.in_time

    @property
    def written(self) -> tuple[Tensor, Tensor, Tensor]:
        """What `write` was given, k and v, and the states between chunks, for what reads them."""
        assert self._inputs is not None and self._states is not None
        return *self._inputs, self._states

    def write(
        self, k: Tensor, v: Tensor, start_states: Tensor | None, end_pieces: Sequence[int], sent_pieces: Sequence[int]
    ) -> Tensor:
        end_slots = tuple(self.call.tiling.pieces[number].last_slot for number in end_pieces)
        outputs = DecayWrite.apply(k, v, self._g, start_states, self.call, end_slots)
        self._states, self._ends, *inputs = outputs
        self._inputs = (inputs[0], inputs[1])
        return self._ends

    def read(self, q: Tensor, wait: Callable[[], Tensor | None], scale: float, overlapped: bool) -> Tensor:
        assert self._inputs is not None
        k, v = self._inputs
        call, size = replace(self.call, scale=scale), v.shape[-1]
        o: Tensor
        if not overlapped:
            o = DecayRead.apply(q, k, v, self._g, self._states, wait(), None, call, size)
            return o
        inside = DecayRead.apply(q, k, v, self._g, None, None, None, call, size)
        o = DecayRead.apply(q, None, None, self._g, self._states, wait(), inside, call, size)
        return o

    @property
    def second_pass(self) -> SecondPass | None:
        return SecondPass(self.call.tiling.chunk_size, num_launches=15)

    def final_states(self, pieces: Sequence[int], rows: Sequence[int], incoming: Tensor | None) -> Tensor:
        assert self._ends is not None
        of_pieces = [self.call.tiling.pieces[number].piece for number in pieces]
        return carried_final_states(take_rows(self._ends, rows, self.call.layout), of_pieces, incoming, self.transition)

    def transition(self, ranges: Sequence[tuple[int, int]]) -> Transition:
        return diagonal_transition(self.decays, ranges, self.call.state_dtype, self.call.tiling.device)
