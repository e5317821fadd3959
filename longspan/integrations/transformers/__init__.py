"""Transformers' models under sequence parallelism; `longspan.parallelize` is the way in. See docs/transformers.md."""

from longspan.integrations.transformers.inputs import shard_batch
from longspan.integrations.transformers.model import layout_of

__all__ = ["layout_of", "shard_batch"]
