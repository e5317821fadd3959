"""Weights that were divided on the meta device, made and initialised: no rank ever holds all of them.

A model built under ``torch.device("meta")`` has shapes and no memory. `shard_weights` divides it as it is. `materialise` then makes
each rank's shares and lets the model initialise itself module by module: a module's own parameters are whole while it sets
them, and each rank keeps its share. As every rank draws the same whole tensors in the same order, the weights are those of one
process, bit for bit, on any mesh. What a rank holds at a time is its shares, and the parameters of one module and their share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from longspan.errors import InputError
from longspan.models.initial import Whole
from longspan.parallel.sharded import copy_whole, is_divided, on_this_rank

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def materialise(model: Model, device: torch.device, initialise: Callable[[Whole], object]) -> Model:
    """Make the weights of a model that was built on the meta device and divided by `shard_weights`; in place.

    Args:
        model: its parameters are on the meta device, and so are its buffers, if it has any.
        device: where they are made.
        initialise: sets all parameters, the same on every rank, those of each module inside ``with whole(module):``; it is called
            with `whole`. For `longspan.models.LinearLlama3` it is ``partial(model.init_weights, seed)``.

    Raises:
        InputError: for a parameter that `initialise` has not set.
    """
    model.to_empty(device=device)
    for parameter in model.parameters():
        on_this_rank(parameter).fill_(torch.nan)
    initialise(_whole)
    missing = [name for name, parameter in model.named_parameters() if bool(on_this_rank(parameter).isnan().any())]
    if missing:
        names = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        raise InputError(
            f"materialise(): `initialise` has not set {names}. Let it set all parameters, those of each module inside whole(module)"
        )
    return model


@contextmanager
def _whole(module: nn.Module) -> Iterator[None]:
    divided = {name: p for name, p in module.named_parameters(recurse=False) if is_divided(p)}
    # On the CPU, where weights are drawn whatever the device.
    whole = {
        name: nn.Parameter(torch.full(p.shape, torch.nan, dtype=p.dtype, device="cpu"), p.requires_grad)
        for name, p in divided.items()
    }
    module._parameters.update(whole)
    try:
        yield
        for name, parameter in divided.items():
            copy_whole(whole[name].detach(), parameter)
    finally:
        module._parameters.update(divided)
