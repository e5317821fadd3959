"""Transformers' models under sequence parallelism; `longspan.parallelize` is the way in. See docs/transformers.md."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from longspan.integrations.transformers.inputs import shard_batch
from longspan.integrations.transformers.pretrained import layout_of, stream_batch

if TYPE_CHECKING:
    from longspan.integrations.transformers.accelerate import SequenceParallelConfig
    from longspan.integrations.transformers.trainer import prepare_trainer

__all__ = ["SequenceParallelConfig", "layout_of", "prepare_trainer", "shard_batch", "stream_batch"]

_NEED_ACCELERATE = {"SequenceParallelConfig": "accelerate", "prepare_trainer": "trainer"}
"""Names whose modules load Accelerate, by module: loaded when they are asked for."""


def __getattr__(name: str) -> Any:
    if name not in _NEED_ACCELERATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_NEED_ACCELERATE[name]}"), name)
