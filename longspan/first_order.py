"""Nodes of autograd that have a first derivative and no second: `first_order`, for their backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from longspan.errors import InputError

Backward = Callable[..., Any]


def first_order(backward: Backward) -> Backward:
    """The backward of a `torch.autograd.Function` that is no graph of its own: what differentiates it again gets an InputError.

    Backward passes here work in place, send messages, and take what other ranks know: differentiated again, they would give
    something, and not the second derivative. PyTorch's `once_differentiable` notices some of these calls alone: it looks at the
    gradients that come in, and not at what was saved, and what asks for the gradient of one input goes around its error.
    """

    @wraps(backward)
    def guarded(ctx: Any, *grads: Any) -> Any:
        # Where nothing is recorded; a compiler refuses second derivatives by itself.
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return backward(ctx, *grads)
        saved = _Saved(ctx)
        with torch.no_grad():
            found = backward(saved, *grads)
        outputs = found if isinstance(found, tuple) else (found,)
        tensors = [x for x in outputs if isinstance(x, Tensor)]
        depends_on = [x for x in (*grads, *saved.saved_tensors) if isinstance(x, Tensor) and x.requires_grad]
        if not tensors or not depends_on:
            return found
        # Through what the gradients depend on, so that every way to a second derivative leads through the error.
        name = type(ctx).__name__.removesuffix("Backward").strip("_")
        refused = iter(_Refuse.apply(name, len(tensors), *tensors, *depends_on))
        together = tuple(next(refused) if isinstance(x, Tensor) else x for x in outputs)
        return together if isinstance(found, tuple) else together[0]

    guarded.is_first_order = True  # type: ignore[attr-defined]
    return guarded


class _Saved:
    """A node's context whose saved tensors are unpacked once: checkpointing recomputes them for one unpacking alone."""

    def __init__(self, ctx: Any) -> None:
        object.__setattr__(self, "_ctx", ctx)
        object.__setattr__(self, "saved_tensors", ctx.saved_tensors)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._ctx, name, value)


class _Refuse(torch.autograd.Function):
    """Gradients as they are, and an error for whatever differentiates them.

    | | shape | |
    |---|---|---|
    | gradients | any | the first `count` of the arguments, and the result |
    | depends_on | any | the other arguments |
    """

    @staticmethod
    def forward(ctx: Any, name: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.name = name
        return tuple(x.detach() for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise InputError(
            f"longspan has first derivatives alone, and {ctx.name} was differentiated twice (a backward pass with "
            "create_graph=True, and one through its result). For Hessian-vector products, gradient penalties and the like, use "
            "differences of first derivatives, or a form that PyTorch differentiates by itself: of an operator the recurrent one, "
            "longspan.ops.variants.VARIANTS[name].recurrent; of a loss torch.nn.functional.cross_entropy"
        )
