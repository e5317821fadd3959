"""What a stretch of tokens leaves to the state behind it, or passes on to the gradient of the state before it, as a sum.

    state behind        Σ_t e^{A d_t} ⊙ (Δ_t u_t) B_tᵀ,    d_t the steps of the tokens after t
    adjoint before      Σ_t e^{A d_t} ⊙ ∂y_t C_tᵀ,         d_t the steps up to t and with it

(the recurrence of arXiv 2312.00752, Algorithm 2, written out; names as in `longspan.ops.selective_scan`).

No state between is needed, so that there is no recurrence, and tokens are taken from the nearest to the farthest. What has decayed
to nothing stays nothing, as no step is negative and no rate positive: such numbers and channels are left out of what is computed,
and where none is left the sum ends, however many tokens follow.

What has decayed to less than e^-60 (e^-600 in float64) is taken as zero: that is 10⁻²⁶ of a token, of which float32 keeps seven
digits beside another. Products of such factors would be denormal numbers besides, with which a CPU is slow. Where any token is not
finite nothing is left out.

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


def may_leave_out(*read: Tensor | None) -> bool:
    """Whether sums may leave out what has decayed to nothing, which is where all that they read is finite.

    On a CPU alone: elsewhere the host would wait for what it decides by.

    Args:
        read: tensors of any shapes, in the dtypes of a call.
    """
    given = [x for x in read if x is not None]
    if any(x.device.type != "cpu" for x in given):
        return False
    # Where a sum overflows nothing is left out either, which is slower and right.
    return all(math.isfinite(x.sum(dtype=torch.promote_types(x.dtype, torch.float32))) for x in given)


class DecayedSum:
    """``Σ_t e^{rates d_t} x_t k_tᵀ`` of one block, chunk by chunk from the nearest token to the farthest, in the dtype of states.

    total: ``[b, N, e]``. distance: the steps of all tokens so far, ``[b, e]``; of one that is left out, of as many as it took.
    channels: those that a chunk is to bring, None for all. over: nothing is left, and no chunk need follow.
    """

    channels: Tensor | None = None
    over: bool = False

    def __init__(self, rates: Tensor, num_rows: int, leaves_out: bool) -> None:
        """rates: ``[N, e]``, in the dtype of states. leaves_out: what has decayed to nothing, see `may_leave_out`."""
        self._rates = self._left_rates = rates
        self._numbers: Tensor | None = None
        self._leaves_out = leaves_out
        self._nothing = _NOTHING[rates.dtype]
        self._room = rates.new_empty(0)
        self.total = rates.new_zeros(num_rows, *rates.shape)
        self.distance = rates.new_zeros(num_rows, rates.shape[1])

    def add(self, steps: Tensor, x: Tensor, key: Tensor, from_last: bool) -> None:
        """Add the tokens of a chunk, of which none is nearer than those before.

        Args:
            steps, x: ``[L, b, e]``, of `channels`. key: ``[L, b, N]``.
            from_last: the last token is the nearest, and its own step is not part of its distance; else the first one is, and its
                step is.
        """
        numbers, channels = self._numbers, self.channels
        columns = slice(None) if channels is None else channels
        rows: slice | Tensor = slice(None)
        if numbers is not None:
            # Two lists of places are paired, unless one is a column.
            rows = numbers if channels is None else numbers.unsqueeze(1)
        steps, x, key = (part.transpose(0, 1) for part in (steps, x, key))
        before = self.distance[:, columns].unsqueeze(1)
        passed = (steps.flip(1) if from_last else steps).cumsum(1).add_(before)
        distances = torch.cat([before, passed[:, :-1]], dim=1).flip(1) if from_last else passed
        self.total[:, rows, columns] += self._sum(distances, x, key if numbers is None else key[..., numbers])
        self.distance[:, columns] = passed[:, -1]
        if self._leaves_out:
            self._leave_out(passed[:, -1])

    def decayed(self, state: Tensor) -> Tensor:
        """A state ``[b, N, e]`` from behind all tokens, as it arrives: ``e^{rates d} state``."""
        return torch.exp(self.distance.unsqueeze(1) * self._rates) * state

    def _leave_out(self, distance: Tensor) -> None:
        """Numbers and channels of which nothing is left at a distance ``[b, e]`` of those that were."""
        # NaN is left.
        left = ~(self._left_rates * distance.amin(0) < self._nothing)
        numbers, channels = left.any(1), left.any(0)
        self._numbers = _kept(self._numbers, numbers)
        self.channels = _kept(self.channels, channels)
        self._left_rates = self._left_rates[numbers][:, channels]
        self.over = not self._left_rates.numel()

    def _sum(self, distances: Tensor, x: Tensor, key: Tensor) -> Tensor:
        """``[b, N, e]``."""
        rates = self._left_rates
        shape = (x.shape[0], rates.shape[0], *x.shape[1:])
        size = math.prod(shape)
        if self._room.numel() < size:
            self._room = rates.new_empty(size)
        factors = torch.mul(distances.unsqueeze(1), rates.unsqueeze(1), out=self._room[:size].view(shape))
        torch.threshold_(factors, self._nothing, float("-inf"))
        factors.exp_().mul_(x.unsqueeze(1))
        return (key.transpose(1, 2).unsqueeze(2) @ factors).squeeze(2)


def _kept(places: Tensor | None, left: Tensor) -> Tensor | None:
    """Of places, None for all, those that are left."""
    if bool(left.all()):
        return places
    return left.nonzero().squeeze(1) if places is None else places[left]
