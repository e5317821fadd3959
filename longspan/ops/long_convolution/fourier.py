"""A causal convolution of any number of taps by the Fourier transform, piece by piece: what `long_conv1d` computes on one device.

Shapes: B batch rows, T tokens, C channels, K taps; n numbers of a transform.

A piece of L tokens is padded with zeros to n ≥ L + K − 1 numbers, so that nothing wraps round; taps beyond L meet no token. A
piece of many more tokens than taps is cut in tiles, and a tile of M tokens is given the K − 1 before it (overlap-save), in n ≥ M
+ K − 1 numbers. Tiles are transformed some channels and some tiles at a time, so that beside x and y a few transforms are there,
whatever T is. Pieces of about the same length share transforms of one size, and with them that of the taps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from longspan.dtypes import accumulation_dtype
from longspan.first_order import first_order
from longspan.layout import SequenceLayout

# Numbers of what is transformed at once, if that is a channel at least: few enough to stay near a core where pieces are short.
_NUMBERS_CPU = 1 << 19
_NUMBERS_DEVICE = 1 << 24
# Channels lie side by side in memory, and fewer would read whole cache lines for a part of each.
_FEWEST_CHANNELS = 16
_SHARE_OF_CHANNELS = 16
# Tokens of a tile at least, where a piece is cut.
_TILE = 2048


@dataclass(frozen=True)
class _Tile:
    """Rows ``[start, stop)``; and the rows of the same piece before them that their taps reach, and behind them that reach them."""

    start: int
    stop: int
    before: int
    after: int


@dataclass(frozen=True)
class _Group:
    """Tiles whose transforms have `size` numbers, with the first `num_taps` taps."""

    tiles: tuple[_Tile, ...]
    size: int
    num_taps: int


Groups = tuple[_Group, ...]


def fourier_groups(layout: SequenceLayout, num_taps: int) -> Groups:
    """How a convolution goes over the pieces that the layout gives this rank; made once for a layout."""
    return layout.cached(("fourier", num_taps), lambda: _group_pieces(layout, num_taps))


def _group_pieces(layout: SequenceLayout, num_taps: int) -> Groups:
    step = max(3 * num_taps, _TILE)
    by_length: dict[tuple[int, int], list[_Tile]] = {}
    for piece in layout.pieces:
        if piece.num_tokens > 2 * step:
            tiles = list(_cut(piece.start, piece.stop, step, num_taps - 1))
            length = step
        else:
            tiles = [_Tile(piece.start, piece.stop, 0, 0)]
            length = _rounded(piece.num_tokens)
        by_length.setdefault((length, min(num_taps, length)), []).extend(tiles)
    groups = []
    for (length, taps), tiles in by_length.items():
        # A piece by itself is not rounded.
        longest = max(tile.stop - tile.start for tile in tiles) if len(tiles) == 1 else length
        taps = min(taps, longest)
        groups.append(_Group(tuple(tiles), fast_size(longest + taps - 1), taps))
    return tuple(groups)


def _cut(start: int, stop: int, step: int, width: int) -> Iterator[_Tile]:
    for first in range(start, stop, step):
        last = min(first + step, stop)
        yield _Tile(first, last, min(width, first - start), min(width, stop - last))


def _rounded(length: int) -> int:
    """The next of 16, 24, 32, 48, 64, ..."""
    size = 16
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


@lru_cache(maxsize=256)
def fast_size(least: int) -> int:
    """The smallest even number of at least `least` without a prime factor above 5: transforms of others take longer."""
    size = max(2, least + least % 2)
    while True:
        rest = size
        for factor in (2, 3, 5):
            while rest % factor == 0:
                rest //= factor
        if rest == 1:
            return size
        size += 2


class ConvolveByFourier(torch.autograd.Function):
    """The convolution of a rank's tokens, as if nothing stood before its pieces.

    | | shape | |
    |---|---|---|
    | x, y | [B, T, C] | |
    | taps | [C, K] | the token's own first |

    Forward: y_t = Σ_j taps_j ⊙ x_{t-j} over the tokens of t's piece. Backward: dx_t = Σ_j taps_j ⊙ dy_{t+j}; dtaps_j = Σ_t dy_t ⊙
    x_{t-j}. Computed in float32 (float64 for float64), and rounded once. dx is always a tensor of its own, which `start_halo`
    relies on.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, taps: Tensor, groups: Groups) -> Tensor:
        ctx.save_for_backward(x, taps)
        ctx.groups = groups
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        for group in groups:
            for channels in _channels(x, group):
                filtered = _of_taps(taps, channels, group, x)
                for parts in _parts(x, group, channels):
                    product = _transform(x, parts, channels, group, before=True).mul_(filtered)
                    _write(y, torch.fft.irfft(product, group.size), parts, channels, before=True)
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, taps = ctx.saved_tensors
        needs_x, needs_taps = ctx.needs_input_grad[:2]
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_x else None
        grad_taps = torch.zeros_like(taps, dtype=accumulation_dtype(x.dtype)) if needs_taps else None
        for group in ctx.groups:
            for channels in _channels(x, group):
                filtered = _of_taps(taps, channels, group, x).conj_physical_()
                total: Tensor | None = None
                for parts in _parts(x, group, channels):
                    grad = _transform(grad_y, parts, channels, group, after=True)
                    if grad_taps is not None:
                        # Each pair of tokens once, by the earlier one.
                        own = _transform(x, parts, channels, group).conj_physical_().mul_(grad).sum(0)
                        total = own if total is None else total.add_(own)
                    if grad_x is not None:
                        _write(grad_x, torch.fft.irfft(grad.mul_(filtered), group.size), parts, channels)
                if grad_taps is not None and total is not None:
                    grad_taps[channels, : group.num_taps] += torch.fft.irfft(total, group.size)[:, : group.num_taps]
        return grad_x, None if grad_taps is None else grad_taps.to(taps.dtype), None


_Part = tuple[_Tile, int]
"""A tile of a row of the batch."""


def _numbers(x: Tensor) -> int:
    return _NUMBERS_CPU if x.device.type == "cpu" else _NUMBERS_DEVICE


def _channels(x: Tensor, group: _Group) -> Iterator[slice]:
    """The channels that are transformed together."""
    num_channels = x.shape[2]
    fewest = max(1, min(_FEWEST_CHANNELS, num_channels // _SHARE_OF_CHANNELS))
    step = max(fewest, _numbers(x) // group.size)
    for start in range(0, num_channels, step):
        yield slice(start, min(start + step, num_channels))


def _parts(x: Tensor, group: _Group, channels: slice) -> Iterator[list[_Part]]:
    """The tiles, of all rows of the batch, that are transformed together."""
    parts = [(tile, row) for tile in group.tiles for row in range(x.shape[0])]
    step = max(1, _numbers(x) // (group.size * (channels.stop - channels.start)))
    for start in range(0, len(parts), step):
        yield parts[start : start + step]


def _of_taps(taps: Tensor, channels: slice, group: _Group, x: Tensor) -> Tensor:
    return torch.fft.rfft(taps[channels, : group.num_taps].to(accumulation_dtype(x.dtype)), group.size)


def _transform(
    x: Tensor, parts: list[_Part], channels: slice, group: _Group, before: bool = False, after: bool = False
) -> Tensor:
    """The transforms of tiles ``[parts, channels, n / 2 + 1]``, with the rows `before` or `after` them if asked for."""
    rows = [
        (row, tile.start - (tile.before if before else 0), tile.stop + (tile.after if after else 0))
        for tile, row in parts
    ]
    longest = max(stop - start for _, start, stop in rows)
    shape = len(rows), channels.stop - channels.start, longest
    spread = torch.zeros(shape, dtype=accumulation_dtype(x.dtype), device=x.device)
    for place, (row, start, stop) in enumerate(rows):
        # Some channels of the rows are copied as they lie first: to copy them across memory from there takes three times as long.
        spread[place, :, : stop - start] = x[row, start:stop, channels].contiguous().t()
    return torch.fft.rfft(spread, group.size)


def _write(y: Tensor, found: Tensor, parts: list[_Part], channels: slice, before: bool = False) -> None:
    """Write the tiles' own rows of ``found [parts, channels, n]``, which begins with the rows `before` them if these were given."""
    for place, (tile, row) in enumerate(parts):
        first = tile.before if before else 0
        y[row, tile.start : tile.stop, channels] = found[place, :, first : first + tile.stop - tile.start].t()
