"""Functions of others' modeling files, replaced by ones that look for a layout: with none, nothing changes.

A modeling file is shared by all models of its kind in the process. Its functions are replaced while a parallelized model of the
kind lives, and put back when the last of them has been unparallelized or is gone: users are counted by weak references.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any
from weakref import WeakSet, finalize

from longspan.integrations.transformers.call import CALL, RUNNING
from longspan.integrations.transformers.fla_functions import FLA_FUNCTIONS
from longspan.integrations.transformers.functions import FUNCTIONS
from longspan.integrations.transformers.losses import BALANCE_LOSS, balance_loss
from longspan.tracing import outside_graphs

_USERS = "longspan_users"
"""Attribute of a modeling file's dispatchers: the models that they are installed for."""


def install(user: object, modeling_files: Iterable[str]) -> None:
    """Replace the functions of modeling files, by their names in `sys.modules`, until `uninstall` or until `user` is gone."""
    files = tuple(modeling_files)
    for module in _modules(files):
        for name, stand_in in _stand_ins(module).items():
            present = module.__dict__.get(name)
            if present is None:
                continue
            if not hasattr(present, _USERS):
                present = balance_loss(present) if stand_in is None else _dispatcher(present, stand_in)
                setattr(present, _USERS, WeakSet())
                setattr(module, name, present)
            getattr(present, _USERS).add(user)
    finalize(user, _put_back, files).atexit = False


def uninstall(user: object, modeling_files: Iterable[str]) -> None:
    """`user` needs no replacement any more; the last user puts the original functions back."""
    files = tuple(modeling_files)
    for function in _replaced(files).values():
        getattr(function, _USERS).discard(user)
    _put_back(files)


def _put_back(modeling_files: Iterable[str]) -> None:
    """Restore the functions that nobody uses any more."""
    for (module, name), function in _replaced(modeling_files).items():
        # Not its length, which counts one that is going.
        if not list(getattr(function, _USERS)):
            setattr(module, name, function.__wrapped__)


def _replaced(modeling_files: Iterable[str]) -> dict[tuple[ModuleType, str], Any]:
    return {
        (module, name): function
        for module in _modules(modeling_files)
        for name in _stand_ins(module)
        if hasattr(function := module.__dict__.get(name), _USERS)
    }


def _modules(modeling_files: Iterable[str]) -> list[ModuleType]:
    return [sys.modules[name] for name in sorted(modeling_files)]


def _stand_ins(module: ModuleType) -> Mapping[str, Callable[..., Any] | None]:
    """What is replaced in a modeling file, by name; None for the balance loss, which is wrapped."""
    return FLA_FUNCTIONS if module.__name__.startswith("fla.") else {**FUNCTIONS, BALANCE_LOSS: None}


def _dispatcher(original: Callable[..., Any], replacement: Callable[..., Any]) -> Callable[..., Any]:
    # A compiled model calls what replaces a kernel as it is: one break of its graph for each mixer.
    replacement = outside_graphs(replacement)

    @functools.wraps(original)
    def dispatch(*args: Any, **kwargs: Any) -> Any:
        call = kwargs.pop(CALL, None)
        if call is None:
            call = RUNNING.get()
        return original(*args, **kwargs) if call is None else replacement(call, *args, **kwargs)

    return dispatch
