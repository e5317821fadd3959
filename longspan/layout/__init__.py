"""Which tokens of a sequence a rank holds, and which of them see each other."""

from longspan.layout.calls import group_of
from longspan.layout.pieces import Piece, Segment
from longspan.layout.sequence_layout import ORDERS, Order, SequenceLayout

__all__ = ["ORDERS", "Order", "Piece", "Segment", "SequenceLayout", "group_of"]
