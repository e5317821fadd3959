"""The same bits from run to run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from longspan.launch import set_deterministic_environment


@contextlib.contextmanager
def deterministic_algorithms(wanted: bool, device: torch.device) -> Iterator[None]:
    """In the block PyTorch takes deterministic operations, and raises RuntimeError for one that it has in no such form."""
    if not wanted:
        yield
        return
    if device.type == "cuda":
        set_deterministic_environment()
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
