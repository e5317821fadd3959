"""Rotary embeddings whose frequencies depend on the largest position of a call (``dynamic``, ``longrope``).

A rank sees the positions of its own tokens alone. So the last position of the longest document is appended to what the embedding is
given, and its row is taken off again.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

_LOOKS_AT_LARGEST = {"dynamic", "longrope"}


def looks_at_largest_position(module: nn.Module) -> bool:
    """Whether a module is such an embedding."""
    kind = getattr(module, "rope_type", None)
    kinds = set(kind.values()) if isinstance(kind, dict) else {kind}
    return bool(kinds & _LOOKS_AT_LARGEST)


def with_last_position(position_ids: Tensor, num_positions: int) -> Tensor:
    """Positions ``[..., T]`` and the last of so many, that of the longest document's last token: ``[..., T + 1]``."""
    return F.pad(position_ids, (0, 1), value=num_positions - 1)


def without_last_position(output: tuple[Any, ...]) -> tuple[Any, ...]:
    """Cosines and sines ``[..., T + 1, D]`` without the row of the position that was appended."""
    return tuple(x[..., :-1, :] for x in output)
