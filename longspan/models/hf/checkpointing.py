"""Activation checkpointing of a model's blocks, as Transformers turns it on and off."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from longspan.exchange import keeping_states


class Recomputed:
    """A block's forward that keeps its inputs alone in training, and computes the rest once more in backward."""

    def __init__(self, block: nn.Module, checkpoint: Callable[..., Any]) -> None:
        self.block = block
        self.checkpoint = keeping_states(checkpoint)

    def __call__(self, *args: Any) -> Any:
        forward = type(self.block).forward
        if not self.block.training:
            return forward(self.block, *args)
        return self.checkpoint(forward, self.block, *args)


def recompute(blocks: Iterable[nn.Module], checkpoint: Callable[..., Any], every: int) -> None:
    """Let every `every`-th block compute again in backward what it has computed; in place.

    checkpoint: as `torch.utils.checkpoint.checkpoint`, reentrant or not. Over ranks a recomputation exchanges no memory states.
    """
    keep_all(blocks := list(blocks))
    for block in blocks[::every]:
        # On the object and not on its class: other models have blocks of this class, too.
        block.forward = Recomputed(block, checkpoint)


def keep_all(blocks: Iterable[nn.Module]) -> None:
    """The opposite of `recompute`."""
    for block in blocks:
        if isinstance(block.__dict__.get("forward"), Recomputed):
            del block.forward
