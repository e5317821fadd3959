"""Functions of kernels as nodes of autograd: operators of PyTorch where a compiler traces them, plain nodes elsewhere.

An operator of torch.library stays one node of a compiled graph, but each call of it costs the host about as much as the launches
inside. So a call that no compiler traces goes round it, through a `torch.autograd.Function` of the same functions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from longspan.first_order import first_order

Function = Callable[..., Any]


def on_device_of_first(function: Function) -> Function:
    """`function`, with the device of its first argument, a tensor, as the current one: that is where Triton launches kernels."""

    @wraps(function)
    def guarded(x: Any, *args: Any) -> Any:
        if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
            return function(x, *args)
        with torch.cuda.device(x.device):
            return function(x, *args)

    return guarded


class Operator:
    """A function without gradient: `function` itself, and `operator`, what a compiler sees of it."""

    def __init__(self, name: str, function: Function, fake: Function) -> None:
        """name: ``"longspan::…"``; fake: the outputs without values, from the same arguments."""
        self.name = name
        self.function = on_device_of_first(function)
        self.operator = torch.library.custom_op(name, function, mutates_args=())
        self.operator.register_fake(fake)


def differentiable(forward: Operator, backward: Operator, setup_context: Function, gradients: Function) -> Function:
    """`forward` with its gradient.

    Args:
        setup_context: ``(ctx, inputs, output)``, as for `torch.autograd.Function`.
        gradients: ``(ctx, backward, *grads)``, one gradient or None for every input; it calls `backward`, which is either form of
            the operator of that name.
    """

    def through(call: Function) -> Function:
        return lambda ctx, *grads: gradients(ctx, call, *grads)

    # One function, as nodes with a setup_context of their own bind arguments by name at every call.
    def run(ctx: Any, *args: Any) -> Any:
        output = forward.function(*args)
        setup_context(ctx, args, output)
        return output

    parts = {"forward": run, "backward": first_order(through(backward.function))}
    # What a profile and an error of anomaly detection show.
    title = forward.name.rpartition(":")[2].title().replace("_", "")
    node: Any = type(title, (torch.autograd.Function,), {name: staticmethod(part) for name, part in parts.items()})
    forward.operator.register_autograd(through(backward.operator), setup_context=setup_context)

    def call(*args: Any) -> Any:
        return forward.operator(*args) if torch.compiler.is_compiling() else node.apply(*args)

    return call
