"""A model over segments of time: a sequence of any length with the activations of one segment, exactly."""

from longspan.models.segments import SegmentDone
from longspan.streaming.adapters import (
    Memory,
    StreamAdapter,
    StreamedModel,
    StreamedSequence,
    register_stream,
)
from longspan.streaming.streamed import Stream, stream

__all__ = [
    "Memory",
    "SegmentDone",
    "Stream",
    "StreamAdapter",
    "StreamedModel",
    "StreamedSequence",
    "register_stream",
    "stream",
]
