"""What torch.autocast means for operators: their inputs are cast as those of a matrix product, and nothing inside them is.

Rotary embeddings and norms leave float32 queries and keys beside bfloat16 values, and parameters are float32: a matrix product
under autocast takes them all in one dtype, and so do the operators. Gates, log decays and states stay in their own.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

# As autocast itself: float64 is computed in float64.
_CAST = (torch.float32, torch.bfloat16, torch.float16)


def as_in_product(x: T) -> T:
    """x in the dtype in which torch.autocast computes products on its device; as it is without autocast, and if it is no tensor."""
    if not isinstance(x, Tensor) or x.dtype not in _CAST or not _is_on(x.device.type):
        return x
    return cast(T, x.to(torch.get_autocast_dtype(x.device.type)))


def as_written(q: T, k: Tensor) -> T:
    """Queries under torch.autocast in the dtype of the keys that they meet, which `as_in_product` has been given."""
    if not isinstance(q, Tensor) or q.dtype not in _CAST or k.dtype not in _CAST or not _is_on(q.device.type):
        return q
    return cast(T, q.to(k.dtype))


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Switches autocast off for the device of x, if it is on."""
    device_type = x.device.type
    return torch.autocast(device_type, enabled=False) if _is_on(device_type) else nullcontext()


def not_cast(function: Callable[Concatenate[Tensor, P], R]) -> Callable[Concatenate[Tensor, P], R]:
    """`function`, of whose products autocast changes none."""

    @wraps(function)
    def call(x: Tensor, *args: P.args, **kwargs: P.kwargs) -> R:
        with without_autocast(x):
            return function(x, *args, **kwargs)

    return call


def _is_on(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
