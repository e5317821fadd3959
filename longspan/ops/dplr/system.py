"""The triangular system of a block's chunks, (I − L) w = M v + α S.

Shapes: as in `longspan.ops.delta.call`; a token has two rows, keyed by b and by k, or one, keyed by b, which writes w + v: then
(I − L) (w + v) = v + α S, and M is the identity.

L, T and the products with T are float64 where an entry of L exceeds 1, as in `longspan.ops.delta.solve`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.ops.decay.factors import WideScores
from longspan.ops.delta.call import DeltaCall, block_factors, causal_part, scores, take_block
from longspan.ops.delta.inverse import unit_lower_inverse
from longspan.ops.delta.solve import is_at_most_one
from longspan.ops.finite import all_finite, finite_part
from longspan.ops.matrices import scaled, times
from longspan.ops.tiling import ChunkBlock


def behind_one(x: Tensor) -> Tensor:
    """Tokens ``[n, B, H, c, D]`` one place further back, the first zero."""
    return torch.nn.functional.pad(x[:, :, :, :-1], (0, 0, 1, 0))


def ahead_one(x: Tensor) -> Tensor:
    """Tokens one place further ahead, the last zero."""
    return torch.nn.functional.pad(x[:, :, :, 1:], (0, 0, 0, 1))


@dataclass(frozen=True)
class ReadAndWritten:
    """Of one block: what reads, a, as queries of the token before; and what is written, its rows.

    first: a of the chunk's first token, which reads the state alone, ``[n, B, H, 1, K]``. later, later_ahead: a_{t+1} at t, without
    and with e^{b̂−m}, ``[n, B, H, c, K]``. query, query_of_rows, key: e^{b̂−m} of tokens and of rows, e^{m−b̂} of rows. enter, leave:
    e^m and e^{b̂_C−m}, ``[n, B or 1, H, 1, D]``. plain, behind: the R rows, without and with `key`, ``[n, B, H, R, K]``. None is 1.
    """

    first: Tensor
    later: Tensor
    later_ahead: Tensor
    query: Tensor | None
    query_of_rows: Tensor | None
    key: Tensor | None
    enter: Tensor | None
    leave: Tensor | None
    plain: Tensor
    behind: Tensor

    @classmethod
    def of(
        cls,
        call: DeltaCall,
        block: ChunkBlock,
        tokens: ChunkBlock,
        keys: Tensor,
        a: Tensor,
        g: Tensor | None,
        decays: Tensor | None,
    ) -> ReadAndWritten:
        """keys of rows ``[B, R, H, K]``, a ``[B, T, H, K]``; decays: as in `block_factors`."""
        factors = block_factors(call, block, g, decays)
        query = None if factors.query is None else call.last_rows(factors.query)
        reading, plain = take_block(call, tokens, a), take_block(call, block, keys)
        later = ahead_one(reading)
        return cls(
            reading[:, :, :, :1],
            later,
            times(later, query),
            query,
            factors.query,
            factors.key,
            None if factors.enter is None else factors.enter.mT,
            None if factors.leave is None else factors.leave.mT,
            plain,
            scaled(plain, factors.key, call.num_heads),
        )

    @property
    def leaving(self) -> Tensor:
        """What each row adds to the state that leaves its chunk, for a unit update."""
        return times(self.behind, self.leave)

    @property
    def of_state(self) -> Tensor:
        """α: what reads of the state before the chunk, ``[n, B, H, c, K]``."""
        alpha = behind_one(times(self.later_ahead, self.enter))
        alpha[:, :, :, :1] = self.first
        return alpha

    def pairs(
        self, call: DeltaCall, block: ChunkBlock, g: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, WideScores | None]:
        """What a_{t+1} reads of the rows of tokens up to t, ``[n, B, H, c, R]`` in `dtype`; for a wide block, its backward."""
        tensors = (self.later, self.plain, self.later_ahead, self.behind)
        found, wide = scores(call, block, g, *(x.to(dtype) for x in tensors))
        return causal_part(found, call.num_steps), wide


@dataclass(frozen=True)
class System:
    """Of one block: T ``[n, B, H, c, c]``, M (None is the identity) and α, in one dtype.

    bad: tokens whose rows of L, M or α are not finite, ``[n, B, H, c, 1]``; None where there are none.
    """

    inverse: Tensor
    through: Tensor | None
    of_state: Tensor
    bad: Tensor | None


def solve(call: DeltaCall, block: ChunkBlock, parts: ReadAndWritten, g: Tensor | None) -> System:
    """The system of one block."""
    lower, through = _pairs_of_tokens(call, block, parts, g, call.dtype)
    if call.dtype != torch.float64 and not is_at_most_one(lower) and not is_at_most_one(finite_part(lower)):
        lower, through = _pairs_of_tokens(call, block, parts, g, torch.float64)
    of_state = parts.of_state.to(lower.dtype)
    bad = None
    parts_of_rows = [x for x in (lower, through, of_state) if x is not None]
    if not all_finite(*parts_of_rows):
        good = torch.ones_like(lower[..., :1], dtype=torch.bool)
        for x in parts_of_rows:
            good &= x.isfinite().all(-1, keepdim=True)
        lower, of_state = finite_part(lower), finite_part(of_state)
        through = None if through is None else finite_part(through)
        bad = ~good
    return System(unit_lower_inverse(lower.neg()), through, of_state, bad)


def _pairs_of_tokens(
    call: DeltaCall, block: ChunkBlock, parts: ReadAndWritten, g: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """L and M, ``[n, B, H, c, c]``."""
    pairs, _ = parts.pairs(call, block, g, dtype)
    if call.num_steps == 1:
        return behind_one(pairs), None
    return behind_one(pairs[..., 0::2]), behind_one(pairs[..., 1::2])
