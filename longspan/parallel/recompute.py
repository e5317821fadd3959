"""Activation checkpointing of a model's blocks: they compute forward once more in backward, and keep little until then."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal, TypeVar

from torch import nn

from longspan.errors import InputError
from longspan.exchange import keeping_exchanges
from longspan.parallel.sharded import blocks_of, is_sharded

Model = TypeVar("Model", bound=nn.Module)
Recomputation = Literal["layer", "selective"]


def recompute_blocks(model: Model, what: Recomputation, *, blocks: Iterable[nn.Module] | None = None) -> Model:
    """Let the blocks of a model keep their inputs alone in forward, and compute the rest once more in backward; in place.

    Args:
        model: before `shard_weights`, which then gathers weights for both.
        what: ``"layer"`` computes everything again, exchanges between ranks included: the least memory. ``"selective"`` keeps what
            exchanges have brought, so that a recomputation runs no collective, and the outputs of softmax layers over ranks, so
            that they attend once (`longspan.exchange.keeping_exchanges` says what that takes).
        blocks: as in `shard_weights`.

    Raises:
        InputError: for another name, a model without blocks, or one whose weights are divided already.
    """
    if what not in ("layer", "selective"):
        raise InputError(f"recompute_blocks() takes 'layer' or 'selective'; got {what!r}")
    if is_sharded(model):
        raise InputError(
            "recompute_blocks() comes before shard_weights(), which is to gather weights around a recomputation"
        )
    from torch.utils.checkpoint import checkpoint

    by: Callable[..., Any] = keeping_exchanges(checkpoint) if what == "selective" else checkpoint
    for block in blocks_of(model, blocks):
        # On the object and not on its class: other models have blocks of this class, too.
        block.forward = partial(by, block.forward, use_reentrant=False)
    return model
