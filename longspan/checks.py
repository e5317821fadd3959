"""Checks of arguments that every public operator makes: tensors, numbers and flags, and tensors that must not change meanwhile.

All of them look at types, shapes and flags alone: none reads a value of a tensor, so that none makes the host wait.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from longspan.errors import InputError


def check_tensors(what: str, **tensors: object) -> None:
    """Raise InputError unless every argument is a plain tensor of a floating dtype; `what` names the caller."""
    for name, x in tensors.items():
        check_tensor(what, name, x)
        if not x.is_floating_point():  # type: ignore[attr-defined]
            raise InputError(
                f"{what}: {name} must be a floating-point tensor; got {described(x)}. Convert it with {name}.float() or .to(dtype)"
            )


def check_tensor(what: str, name: str, x: object) -> None:
    """Raise InputError unless x is a plain tensor: no number, list or None, and no DTensor."""
    # What nearly every call has, first.
    if type(x) is Tensor:
        return
    if not isinstance(x, Tensor):
        raise InputError(
            f"{what}: {name} must be a torch.Tensor; got {described(x)}. Make a tensor of it before the call, as with "
            "torch.tensor() or torch.full()"
        )
    # By its method and not by its class, whose import would load all of torch.distributed.tensor.
    if hasattr(type(x), "to_local"):
        raise InputError(
            f"{what}: {name} must be a plain tensor, this rank's part; got {described(x)}. Pass {name}.to_local() (after "
            "redistribute(), where its placement is Partial), and say with layout= which tokens of the sequence these are"
        )


def check_scale(what: str, scale: object, default: float) -> float:
    """The scale of queries and keys as a float: a finite number of either sign, zero, or None for `default`.

    Raises:
        InputError: for anything else, and for a tensor that requires a gradient, which would get none.
    """
    if scale is None:
        return default
    if isinstance(scale, Tensor):
        if scale.requires_grad:
            raise InputError(
                f"{what}: scale must be a number, and takes no gradient; got {described(scale)} that requires one. Multiply q by "
                "it and pass scale=1.0: so it learns"
            )
        if scale.numel() != 1 or scale.is_complex() or scale.dtype == torch.bool:
            raise InputError(
                f"{what}: scale must be a number for all heads, or None; got {described(scale)}. Multiply q by it and pass "
                "scale=1.0"
            )
        scale = scale.item()
    return check_number(what, "scale", scale)


def check_number(what: str, name: str, value: Any, at_least: float = -math.inf, remedy: str = "") -> float:
    """`value` as a float; raises InputError unless it is a finite number that is `at_least` so much."""
    if type(value) in (int, float) and torch.compiler.is_compiling():
        # A compiler may hold it as a symbol, which no test of its value should fix.
        return value
    is_number = not isinstance(value, bool | str | bytes | complex | Tensor) and hasattr(value, "__float__")
    number = float(value) if is_number else math.nan
    if not math.isfinite(number) or number < at_least:
        limit = "" if at_least == -math.inf else f" of at least {at_least:g}"
        raise InputError(
            f"{what}: {name} must be a finite number{limit}; got {described(value)}. "
            f"{remedy or 'Pass a float, or leave it out for the default'}"
        )
    return number


def check_flag(what: str, name: str, value: object) -> bool:
    """`value`; raises InputError unless it is True or False."""
    if not isinstance(value, bool):
        raise InputError(
            f"{what}: {name} must be True or False; got {described(value)}. Pass bool(...) if it is meant as one"
        )
    return value


def check_choice(
    what: str, name: str, value: object, choices: Iterable[str], remedy: str, or_none: bool = False
) -> None:
    """Raise InputError unless `value` is one of `choices`, which are strings (or None, where it may be)."""
    known = tuple(choices)
    if not ((isinstance(value, str) and value in known) or (value is None and or_none)):
        none = "None or " if or_none else ""
        raise InputError(f"{what}: {name} must be {none}one of {', '.join(map(repr, known))}; got {value!r}. {remedy}")


def is_int(value: object) -> bool:
    """True for an int that is no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_count(what: str, name: str, value: Any, meaning: str = "") -> None:
    """Raise InputError unless `value` is an int of at least 1; `meaning` says what it counts, and what stands for none."""
    if not is_int(value) or value < 1:
        raise InputError(
            f"{what}: {name} must be a positive int{meaning and ', '}{meaning}; got {described(value)}. Pass 1 or more"
        )


def check_not_empty(what: str, name: str, x: Tensor, dims: str = "row, token, head and channel") -> None:
    """Raise InputError where a dimension of x is 0; `dims` says what they are."""
    if 0 in x.shape:
        raise InputError(
            f"{what} needs at least one {dims}; got {name} of shape {tuple(x.shape)}. Leave the call out "
            "where there is nothing to compute"
        )


def check_same_device(what: str, **tensors: Tensor | None) -> None:
    """Raise InputError unless all tensors are on the device of the first one; None stands for none."""
    first_name, first = next(iter(tensors.items()))
    assert first is not None
    for name, x in tensors.items():
        if x is not None and x.device != first.device:
            raise InputError(
                f"{what} takes its tensors on one device; got {first_name} on {first.device} and {name} on {x.device}. Move "
                f"{name} with {name}.to({first_name}.device)"
            )


def described(value: object) -> str:
    """A value as an error shows it."""
    if isinstance(value, Tensor):
        text = f"a {type(value).__name__} of {value.dtype} and shape {tuple(value.shape)}"
        placements = getattr(value, "placements", None)
        return text if placements is None else f"{text} with placements {placements}"
    text = repr(value)
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"


class Unchanged:
    """Tensors that are written and read later, with PyTorch's counters of how often each was changed in place.

    Autograd looks at the same counters, and only where gradients are wanted. Tensors made in inference mode have none, and a
    compiler sees changes by itself: these are not looked at.
    """

    def __init__(self, what: str, **tensors: Tensor | None) -> None:
        self._what = what
        compiling = torch.compiler.is_compiling()
        self._versions = [
            (name, x, x._version)
            for name, x in tensors.items()
            if x is not None and not compiling and not x.is_inference()
        ]

    def check(self) -> None:
        """Raise InputError where a tensor was changed in place since."""
        for name, x, version in self._versions:
            if x._version != version:
                raise InputError(
                    f"{self._what}: {name} was changed in place ({x._version - version} times) between write and read: what was "
                    f"written of it would no longer belong to what is read. Change {name} after the read, or a copy: "
                    f"write(..., {name}.clone(), ...)"
                )
