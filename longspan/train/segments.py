"""How a run cuts its sequences in segments of time."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from longspan.streaming import Stream
from longspan.train.config import TrainConfig


@dataclass(frozen=True)
class Segmentation:
    """How sequences are cut in segments of time: as `longspan.stream` takes it."""

    segment_tokens: int
    keep_every: int = 1
    offload: bool = False
    reduce_each: bool = False

    @classmethod
    def of(cls, train: TrainConfig) -> Segmentation | None:
        """That of a run; None where it takes sequences whole."""
        if train.segment_tokens is None:
            return None
        return cls(train.segment_tokens, train.segment_memory_every, train.segment_offload, train.segment_reduce_each)

    def for_check(self, num_tokens: int, num_ranks: int) -> Segmentation:
        """That of a batch of `num_tokens`, of which a check sees three segments at least."""
        segment_tokens = max(num_ranks, min(self.segment_tokens, -(-num_tokens // 3)))
        return replace(self, segment_tokens=segment_tokens)

    def stream(self, model: nn.Module) -> Stream:
        """The model in such segments."""
        return Stream(model, self.segment_tokens, self.keep_every, self.offload, self.reduce_each)
