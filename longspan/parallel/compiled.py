"""torch.compile of a model's blocks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import nn

from longspan.errors import ConfigError, InputError
from longspan.parallel.sharded import blocks_of, is_sharded

Model = TypeVar("Model", bound=nn.Module)


def compile_blocks(model: Model, *, blocks: Iterable[nn.Module] | None = None, backend: str = "inductor") -> Model:
    """Let `torch.compile` compile each block of a model by itself, so that equal blocks are compiled once; in place.

    Args:
        model: before `compute_in`, `recompute_blocks` and `shard_weights`, which stay outside of what is compiled.
        blocks: as in `shard_weights`.
        backend: as `torch.compile` takes it.

    On one device a block is one graph. Over ranks its exchanges stand between graphs (docs/design.md).

    Raises:
        InputError: for a model without blocks, or one whose weights are divided.
    """
    if is_sharded(model):
        raise InputError(
            "compile_blocks() comes before shard_weights(), which is to gather weights outside of the graphs"
        )
    for block in blocks_of(model, blocks):
        # On the object and not on its class: other models have blocks of this class, too.
        block.forward = torch.compile(block.forward, backend=backend)
    return model


def check_compiler(device: torch.device) -> None:
    """Compile a trifle for a device.

    Raises:
        ConfigError: where `torch.compile` does not work, with its reason.
    """
    try:
        torch.compile(_trifle)(torch.ones(2, device=device))
    except Exception as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        needed = "a C++ compiler" if device.type == "cpu" else "Triton and a C compiler"
        raise ConfigError(
            f"torch.compile does not work here on {device.type}: {reason}. It needs {needed}: install what is missing, "
            "or go without (train.compile)"
        ) from error


def _trifle(x: torch.Tensor) -> torch.Tensor:
    return x.sin() + 1.0
