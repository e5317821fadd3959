"""The chunk form of the delta rule, from its phases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from longspan.dtypes import accumulation_dtype
from longspan.layout import SequenceLayout
from longspan.layout.rows import take_rows
from longspan.ops.decay.factors import factors_of
from longspan.ops.delta.call import DeltaCall
from longspan.ops.delta.read import DeltaRead, DeltaScores
from longspan.ops.delta.run import DeltaRun
from longspan.ops.delta.write import DeltaWrite, PhaseLink
from longspan.ops.factor_variant import FactorVariant
from longspan.ops.gates import Gate, Gates, LogDecays
from longspan.ops.tiling import chunks_of_block, tile
from longspan.ops.variants.variant import ChunkForm, SecondPass
from longspan.state import Dense, Transition

DEFAULT_CHUNK_SIZE = 64

BETA = Gate("beta", "BTH")
"""How much of what its key reads a token replaces."""


@dataclass(frozen=True, kw_only=True)
class DeltaVariant(FactorVariant):
    """A variant of the delta rule, described by its recurrent form and what decays."""

    strength: Gate = BETA
    backends: tuple[str, ...] = ("torch", "fla")

    @property
    def gates(self) -> tuple[Gate, ...]:
        return (*self.decay.gates, self.strength)

    @property
    def transition(self) -> type[Transition]:
        return Dense

    def prepare(
        self, k: Tensor, v: Tensor, gates: Gates, layout: SequenceLayout, chunk_size: int | None, backend: str
    ) -> ChunkForm:
        decays, beta = self.decay.of(gates), gates[self.strength.name]
        if backend == "fla":
            from longspan.ops.fla.delta_rule import prepare_fla

            return prepare_fla(self.name, k, v, decays, beta, layout, chunk_size)
        return DeltaChunkForm(begin_call(k, v, decays, layout, chunk_size), decays, householder_steps(beta))


class WritePhase(Protocol):
    """The node of the write phase, which returns what `DeltaWrite` does; g is of rows."""

    def __call__(
        self,
        k: Tensor,
        v: Tensor,
        g: Tensor | None,
        start_states: Tensor | None,
        call: DeltaCall,
        end_pieces: tuple[int, ...],
        link: PhaseLink,
    ) -> tuple[Any, ...]: ...


def householder_steps(beta: Tensor) -> WritePhase:
    """That of the delta rule, ``beta [B, T, H]``, or of several steps per token, ``[B, T, N, H]``."""

    def write(
        k: Tensor,
        v: Tensor,
        g: Tensor | None,
        start_states: Tensor | None,
        call: DeltaCall,
        end_pieces: tuple[int, ...],
        link: PhaseLink,
    ) -> tuple[Any, ...]:
        rows = (k, v, beta)
        if beta.dim() == 4:
            rows = (k.flatten(1, 2), v.flatten(1, 2), beta.flatten(1, 2))
        written: tuple[Any, ...] = DeltaWrite.apply(*rows, g, start_states, call, end_pieces, link)
        return written

    return write


def begin_call(
    k: Tensor, v: Tensor, decays: LogDecays, layout: SequenceLayout, chunk_size: int | None, num_steps: int = 1
) -> DeltaCall:
    """What the phases of a call share; k, v and decays of rows, of which a token has `num_steps`."""
    num_heads, size = v.shape[2], chunk_size or max(1, DEFAULT_CHUNK_SIZE // num_steps)
    block_chunks, dtype = chunks_of_block(k, v, size * num_steps), accumulation_dtype(v.dtype)
    of_tokens = tile(layout, size, block_chunks, k.device)
    tiling = of_tokens if num_steps == 1 else tile(layout, size, block_chunks, k.device, num_steps)
    factors = factors_of(decays.on(layout, k.device), tiling, num_heads, dtype, dtype)
    return DeltaCall(layout, tiling, factors, num_heads, dtype, of_tokens, num_steps)


@dataclass(frozen=True)
class _Written:
    """What `DeltaWrite` returned, for the later phases."""

    updates: Tensor
    weights: Tensor
    k: Tensor
    decays: Tensor | None
    ticket: Tensor | None


@dataclass
class DeltaChunkForm(ChunkForm):
    """The chunk form of the delta rule; its decays are of rows, of which a token has `DeltaCall.num_steps`."""

    call: DeltaCall
    decays: LogDecays
    write_phase: WritePhase
    _written: _Written | None = None
    _start_states: Tensor | None = None
    _link: PhaseLink = field(default_factory=lambda: PhaseLink(frozenset()))
    _products: dict[int, Tensor] = field(default_factory=dict)
    _run: tuple[Tensor, Tensor] | None = None

    @property
    def _g(self) -> Tensor | None:
        return self.decays.in_time

    def write(
        self, k: Tensor, v: Tensor, start_states: Tensor | None, end_pieces: Sequence[int], sent_pieces: Sequence[int]
    ) -> Tensor:
        self._link = PhaseLink(frozenset(sent_pieces))
        updates, weights, ends, products, *rest = self.write_phase(
            k, v, self._g, start_states, self.call, tuple(end_pieces), self._link
        )
        self._written, self._start_states = _Written(updates, weights, *rest), start_states
        self._products = dict(zip(end_pieces, products.unbind(0), strict=True))
        result: Tensor = ends
        return result

    def _states(self, incoming: Tensor | None) -> tuple[Tensor, Tensor]:
        """The state that enters every chunk and leaves every piece, and what the tokens write; see `DeltaRun`."""
        if self._run is None:
            written = self._written
            assert written is not None
            own = (written.updates, written.weights, written.decays, written.k, self._g)
            # A first read without gradients must not cut off those of later ones.
            with_gradients = written.updates.requires_grad or (incoming is not None and incoming.requires_grad)
            with torch.set_grad_enabled(torch.is_grad_enabled() or with_gradients):
                self._run = DeltaRun.apply(*own, self._start_states, incoming, self.call, self._link)
        return self._run

    def read(self, q: Tensor, wait: Callable[[], Tensor | None], scale: float, overlapped: bool) -> Tensor:
        # The scores are a node of their own in any case, so they always go before the wait.
        written, call = self._written, self.call
        assert written is not None
        scores, q, ticket = DeltaScores.apply(
            q, written.k, written.ticket, self._g, written.decays, call, self._link, scale
        )
        states = self._states(wait())
        o: Tensor = DeltaRead.apply(scores, q, ticket, *states, self._g, written.decays, call, self._link, scale)
        return o

    @property
    def second_pass(self) -> SecondPass | None:
        return None

    def final_states(self, pieces: Sequence[int], rows: Sequence[int], incoming: Tensor | None) -> Tensor:
        states, _ = self._states(incoming)
        return take_rows(states, [self.call.tiling.pieces[number].last_slot for number in pieces], self.call.layout)

    def transition(self, ranges: Sequence[tuple[int, int]]) -> Transition:
        assert self._written is not None
        like = self._written.weights
        identity = torch.eye(like.shape[-1], dtype=like.dtype, device=like.device).expand(*like.shape[1:3], -1, -1)
        products = []
        for start, stop in ranges:
            # A range of several pieces starts a document, and a range of none changes nothing.
            product = identity
            for number, entry in enumerate(self.call.of_tokens.pieces):
                if (entry.piece.start, entry.piece.stop) == (start, stop) and number in self._products:
                    product = self._products[number]
            products.append(product)
        return Dense(torch.stack(products))
