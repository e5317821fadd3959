"""Models that know nothing of `SequenceMixer`: for each class, what makes its modules take a layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from longspan.errors import InputError
from longspan.models.mixers import ParallelOptions, SequenceParallel

Model = TypeVar("Model", bound=nn.Module)

Adapter = Callable[[Model, ParallelOptions, SequenceParallel], Callable[[], None] | None]
"""Changes a model in place, so that it runs on this rank's tokens; raises InputError for one that it cannot change.

What it returns undoes that, for `longspan.unparallelize`; None if it cannot be undone.
"""

_ADAPTERS: dict[type[nn.Module], Adapter[Any]] = {}


def register_adapter(model_class: type[Model], adapter: Adapter[Model]) -> None:
    """Let `longspan.parallelize` take models of a class, or derived from it, by calling ``adapter(model, options, place)``.

    Args:
        model_class: what the adapter is for; one that was registered for it before is replaced. A class nearer to the model's
            own goes before one further up.
        adapter: is given the model, how layers exchange (`ParallelOptions`), and the group that it runs in (`SequenceParallel`).
            Its part is that every layer which mixes tokens gets the layout of a call: as an argument, or by what it puts in the
            layer's place.

    Raises:
        InputError: for a class that is no module's, or an adapter that cannot be called.
    """
    given: object = model_class
    if not (isinstance(given, type) and issubclass(given, nn.Module)):
        raise InputError(
            f"register_adapter() takes a class of torch.nn.Module; got {model_class!r}. Pass type(model), not the model"
        )
    if not callable(adapter):
        raise InputError(
            f"register_adapter() takes an adapter that is called as adapter(model, options, place); got {adapter!r}. "
            "Pass a function"
        )
    _ADAPTERS[model_class] = adapter


def adapter_of(model_class: type[nn.Module]) -> Adapter[Any] | None:
    """The adapter of a class, or of the nearest class that it derives from."""
    return next((_ADAPTERS[base] for base in model_class.__mro__ if base in _ADAPTERS), None)
