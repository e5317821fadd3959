"""Which tokens of a sequence a rank holds, and which of them see each other."""

from longspan.layout.sequence_layout import ORDERS, Order, Piece, Segment, SequenceLayout, group_of

__all__ = ["ORDERS", "Order", "Piece", "Segment", "SequenceLayout", "group_of"]
