"""Memory that nothing has written is NaN, so that a result which depends on it shows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def unwritten_memory_is_nan() -> Iterator[None]:
    """Fill `torch.empty` and what is like it with NaN, in all threads of this process; also a decorator of functions.

    PyTorch fills memory only where it is asked for deterministic algorithms too.
    """
    deterministic: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(1).isnan() and torch.empty(1).new_empty(2).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        deterministic.fill_uninitialized_memory = before[1]
