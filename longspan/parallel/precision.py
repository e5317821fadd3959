"""Mixed precision without FSDP2: blocks compute with a cast of their weights, which stay as they are.

What FSDP2's `MixedPrecisionPolicy` does where it gathers weights, this does where there is nothing to gather: weights are cast as a
block begins, inputs with them, and gradients arrive in the dtype of the weights. It is no autocast, which casts products alone:
activations between layers are in the lower precision, too, and a run is the same with FSDP2 and without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from longspan.errors import InputError
from longspan.parallel.sharded import blocks_of, cast_input, is_sharded

Model = TypeVar("Model", bound=nn.Module)
Place = tuple[nn.Module, str]
"""A module and the name of a parameter of its own."""


def compute_in(model: Model, dtype: torch.dtype, *, blocks: Iterable[nn.Module] | None = None) -> Model:
    """Let the blocks of a model, and the model around them, compute with their weights cast to `dtype`; in place.

    Args:
        model: with weights in float32 or wider, which stay; so do gradients and the optimizer.
        dtype: such as torch.bfloat16. Memory states, decays and sums are float32 or wider whatever it is.
        blocks: as in `shard_weights`, whose argument `dtype` is for weights that are divided over ranks.

    Raises:
        InputError: for a dtype that is not floating, a model without blocks, or one whose weights are divided.
    """
    if not dtype.is_floating_point:
        raise InputError(f"compute_in() takes a floating dtype; got {dtype}. Pass torch.bfloat16")
    if is_sharded(model):
        raise InputError("compute_in() is for whole weights: give dtype to shard_weights()")
    units = blocks_of(model, blocks)
    inside = {id(parameter) for unit in units for parameter in unit.parameters()}
    for unit in units:
        _cast_in_forward(unit, [(m, n) for m in unit.modules() for n in m._parameters], dtype)
    around = [
        (m, n) for m in model.modules() for n, p in m._parameters.items() if p is not None and id(p) not in inside
    ]
    _cast_in_forward(model, around, dtype)
    return model


def _cast_in_forward(module: nn.Module, places: list[Place], dtype: torch.dtype) -> None:
    # On the object and not on its class: other models have modules of this class, too.
    module.forward = partial(_forward_cast, module.forward, places, dtype)


def _forward_cast(
    forward: Callable[..., Any], places: list[Place], dtype: torch.dtype, *args: Any, **kwargs: Any
) -> Any:
    with _cast(places, dtype):
        return forward(
            *(cast_input(x, dtype) for x in args), **{name: cast_input(x, dtype) for name, x in kwargs.items()}
        )


@contextmanager
def _cast(places: list[Place], dtype: torch.dtype) -> Iterator[None]:
    """In the block, modules have casts of their parameters, one for each, however many modules share it."""
    before = [(module, name, module._parameters[name]) for module, name in places]
    casts: dict[int, Any] = {}
    try:
        for module, name, parameter in before:
            if parameter is not None and parameter.is_floating_point():
                casts.setdefault(id(parameter), parameter.to(dtype))
                module._parameters[name] = casts[id(parameter)]
        yield
    finally:
        for module, name, parameter in before:
            module._parameters[name] = parameter
