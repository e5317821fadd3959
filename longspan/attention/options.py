"""The options that operators share: their types, their defaults, and operators that take them.

What an operator returns follows from `output_final_state`, which its overloads say. The other options stand there, and in the
definition, as one of these classes; `takes` gives the definition its signature, in which every option has its default.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, Literal, TypedDict, TypeVar, cast, get_type_hints

from torch import Tensor

from longspan.exchange import Exchanger
from longspan.layout import SequenceLayout

Definition = TypeVar("Definition", bound=Callable[..., Any])

Schedule = Literal["auto", "fused", "overlapped"]
SCHEDULES: tuple[Schedule, ...] = ("auto", "fused", "overlapped")
"""In which order one call computes: see `longspan.linear_attention`."""


class StateOptions(TypedDict, total=False):
    """What everything takes that carries a state over ranks: see `longspan.linear_attention`."""

    initial_state: Tensor | None
    layout: SequenceLayout | None
    exchange: str | Exchanger
    backend: str | None
    chunk_size: int | None


class LayerOptions(StateOptions, total=False):
    """What every layer of linear attention takes beside its tensors."""

    schedule: Schedule


class OperatorOptions(LayerOptions, total=False):
    """What every operator takes beside its tensors."""

    scale: float | None


class BidirectionalOptions(OperatorOptions, total=False):
    """What an operator takes that has ``causal=False``."""

    causal: bool


# In the order in which signatures show them.
DEFAULTS: BidirectionalOptions = {
    "scale": None,
    "causal": True,
    "initial_state": None,
    "layout": None,
    "exchange": "auto",
    "schedule": "auto",
    "backend": None,
    "chunk_size": None,
}


def takes(options: type) -> Callable[[Definition], Definition]:
    """A definition that ends in ``**options: Unpack[...]`` of this class, as an operator: it is given all of them, by `DEFAULTS`.

    `help` and `inspect.signature` show them one by one, and another name raises TypeError, as where parameters are written out.
    """
    hints = get_type_hints(options)
    defaults = {name: value for name, value in DEFAULTS.items() if name in hints}
    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value, annotation=hints[name])
        for name, value in defaults.items()
    ]

    def operator_of(definition: Definition) -> Definition:
        written = inspect.signature(definition, eval_str=True)
        signature = written.replace(parameters=list(_merged(written, parameters)))
        known = frozenset(signature.parameters)

        @wraps(definition)
        def operator(*args: Any, **given: Any) -> Any:
            for name in given:
                if name not in known:
                    raise TypeError(f"{definition.__name__}() got an unexpected keyword argument {name!r}")
            return definition(*args, **{**defaults, **given})

        operator.__signature__ = signature  # type: ignore[attr-defined]
        return cast(Definition, operator)

    return operator_of


def _merged(written: inspect.Signature, options: list[inspect.Parameter]) -> Iterator[inspect.Parameter]:
    """The parameters of a definition, its ``**options`` one by one."""
    for parameter in written.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            yield from options
        else:
            yield parameter
