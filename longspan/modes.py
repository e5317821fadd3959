"""Building what outlives a call, whatever mode the call is in."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def built_for_every_mode(build: Callable[[], T]) -> T:
    """What `build` returns, built without gradients, outside inference mode and without autocast.

    For what is kept and serves later calls too. A tensor that is made in inference mode may neither be saved for backward nor be
    written to outside it, and what is computed under autocast has its dtype.
    """
    # A compiler follows none of the modes, and what it builds belongs to the compiled code.
    if torch.compiler.is_compiling():
        return build()
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            return built_for_every_mode(build)
    with torch.no_grad():
        for device_type in _autocast_devices():
            if torch.is_autocast_enabled(device_type):
                with torch.autocast(device_type, enabled=False):
                    return built_for_every_mode(build)
        return build()


def _autocast_devices() -> tuple[str, ...]:
    accelerator = torch.accelerator.current_accelerator()
    return ("cpu",) if accelerator is None else ("cpu", accelerator.type)
