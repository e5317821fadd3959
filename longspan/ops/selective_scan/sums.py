"""What a stretch of tokens leaves to the state behind it, or passes on to the gradient of the state before it, as a sum.

    state behind        Σ_t e^{A d_t} ⊙ (Δ_t u_t) B_tᵀ,    d_t the steps of the tokens after t
    adjoint before      Σ_t e^{A d_t} ⊙ ∂y_t C_tᵀ,         d_t the steps up to t and with it

(the recurrence of arXiv 2312.00752, Algorithm 2, written out; names as in `longspan.ops.selective_scan`).

No state between is needed, so that there is no recurrence, and tokens are taken from the nearest to the farthest: what has
decayed to nothing ends the sum. Where that is so for some numbers or channels, these are left out of what is computed.

What has decayed to less than e^-60 (e^-600 in float64) is taken as zero: that is 10⁻²⁶ of a token, of which float32 keeps seven
digits beside another. Products of such factors would be denormal numbers besides, with which a CPU is slow. What is NaN or infinite
is left out nowhere.

Shapes: L tokens, b rows and e channels of a block, N numbers of a state.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SUMMED = 128
"""Tokens that are summed at a time."""

_NOTHING = {torch.float32: -60.0, torch.float64: -600.0}
"""Exponents from which on a factor is zero, by the dtype of states."""


class DecayedSum:
    """``Σ_t e^{rates d_t} x_t k_tᵀ`` of one block, chunk by chunk from the nearest token to the farthest, in the dtype of states.

    total: ``[b, N, e]``. distance: the steps of all tokens so far, ``[b, e]``.
    """

    def __init__(self, rates: Tensor, num_rows: int) -> None:
        """rates: ``[N, e]``, in the dtype of states."""
        self._rates = rates
        self._nothing = _NOTHING[rates.dtype]
        self._room = rates.new_empty(0)
        self.total = rates.new_zeros(num_rows, *rates.shape)
        self.distance = rates.new_zeros(num_rows, rates.shape[1])

    def add(self, steps: Tensor, x: Tensor, key: Tensor, from_last: bool) -> None:
        """Add the tokens of a chunk, of which none is nearer than those before.

        Args:
            steps, x: ``[L, b, e]``. key: ``[L, b, N]``.
            from_last: the last token is the nearest, and its own step is not part of its distance; else the first one is, and its
                step is.
        """
        steps, x, key = (part.transpose(0, 1) for part in (steps, x, key))
        left = self._left()
        if left is None:
            self.total += self._sum(self._rates, self._distances(steps, from_last), x, key)
            return
        # Zero, but for what is not finite, of which infinite steps alone let nothing through.
        total_steps = steps.sum(1)
        self.total += (total_steps.clamp(max=0) + x.sum(1) * 0).unsqueeze(1) + (key.sum(1) * 0).unsqueeze(2)
        numbers, channels = left
        if not numbers.numel():
            self.distance = self.distance + total_steps
            return
        rates, key = self._rates[numbers], key.index_select(-1, numbers)
        rates, distances, x = (
            part.index_select(-1, channels) for part in (rates, self._distances(steps, from_last), x)
        )
        self.total[:, numbers.unsqueeze(1), channels] += self._sum(rates, distances, x, key)

    def _distances(self, steps: Tensor, from_last: bool) -> Tensor:
        """Those of a chunk's tokens, ``[b, L, e]``; they are gone through."""
        before = self.distance.unsqueeze(1)
        passed = (steps.flip(1) if from_last else steps).cumsum(1).add_(before)
        self.distance = passed[:, -1]
        return torch.cat([before, passed[:, :-1]], dim=1).flip(1) if from_last else passed

    def decayed(self, state: Tensor) -> Tensor:
        """A state ``[b, N, e]`` from behind all tokens, as it arrives: ``e^{rates d} state``."""
        return torch.exp(self.distance.unsqueeze(1) * self._rates) * state

    def _left(self) -> tuple[Tensor, Tensor] | None:
        """Numbers and channels of which something is left at the distance gone through; None is all of them.

        On a CPU alone: elsewhere the host would wait for what it decides by.
        """
        if self.distance.device.type != "cpu":
            return None
        # NaN is left.
        left = ~(self._rates * self.distance.amin(0) < self._nothing)
        numbers, channels = left.any(1), left.any(0)
        if bool(numbers.all()) and bool(channels.all()):
            return None
        return numbers.nonzero().squeeze(1), channels.nonzero().squeeze(1)

    def _sum(self, rates: Tensor, distances: Tensor, x: Tensor, key: Tensor) -> Tensor:
        """``[b, N, e]``."""
        shape = (x.shape[0], rates.shape[0], *x.shape[1:])
        size = math.prod(shape)
        if self._room.numel() < size:
            self._room = rates.new_empty(size)
        factors = torch.mul(distances.unsqueeze(1), rates.unsqueeze(1), out=self._room[:size].view(shape))
        torch.threshold_(factors, self._nothing, float("-inf"))
        factors.exp_().mul_(x.unsqueeze(1))
        return (key.transpose(1, 2).unsqueeze(2) @ factors).squeeze(2)
