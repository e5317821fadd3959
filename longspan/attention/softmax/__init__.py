"""Softmax attention over a sequence that is split over ranks (LASP-2H)."""

from longspan.attention.softmax.attention import (
    SOFTMAX_METHODS,
    SoftmaxMemory,
    SoftmaxMethod,
    softmax_attention,
    write_softmax,
)
from longspan.attention.softmax.earlier import EarlierKeys

__all__ = ["SOFTMAX_METHODS", "EarlierKeys", "SoftmaxMemory", "SoftmaxMethod", "softmax_attention", "write_softmax"]
