"""Which key and value heads the query heads of a rank read, of keys that have all of them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from longspan.dtypes import at_least_float32


@dataclass(frozen=True)
class KeyHeads:
    """Key and value heads ``[start, stop)``; `sources`: for each query head its key head's number among them, or None where the
    kernels group query heads so.
    """

    start: int
    stop: int
    sources: Tensor | None = None

    def take(self, x: Tensor) -> Tensor:
        """Of keys or values ``[B, L, H_kv, D or D_v]`` those that the query heads read."""
        return spread(x[:, :, self.start : self.stop], self.sources)

    def add(self, total: Tensor, grad: Tensor) -> None:
        """Add the gradient of what `take` gave to that of all heads, in place."""
        own = total[:, :, self.start : self.stop]
        if self.sources is None:
            own += grad
        else:
            own.index_add_(2, self.sources, grad.to(own.dtype))


def spread(x: Tensor, sources: Tensor | None) -> Tensor:
    """Key or value heads ``[B, N, n, ·]`` as one per query head, ``[B, N, h, ·]``; as they are without `sources`."""
    return x if sources is None else x.index_select(2, sources)


def summed(grad: Tensor, sources: Tensor | None, keys: Tensor) -> Tensor:
    """The gradient of what `spread` took, ``[B, N, n, ·]``."""
    if sources is None:
        return grad
    return at_least_float32(grad.new_zeros(keys.shape)).index_add_(2, sources, at_least_float32(grad))
