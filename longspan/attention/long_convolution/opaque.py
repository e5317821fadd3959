"""Long convolutions as one operator of PyTorch each, for calls without values: see `longspan.tracing`."""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.attention.opaque import layout_of
from longspan.dtypes import accumulation_dtype
from longspan.tracing import OpaqueOperator


def _taps(
    x: Tensor, taps: Tensor, initial_state: Tensor | None, bounds: Tensor | None, output_final_state: bool
) -> tuple[Tensor, Tensor]:
    """y, and the final state (empty where it is not wanted)."""
    from longspan.attention.long_convolution.operator import long_conv1d

    layout = layout_of(x, bounds)
    found = long_conv1d(x, taps, initial_state=initial_state, output_final_state=output_final_state, layout=layout)
    return found if isinstance(found, tuple) else (found, x.new_empty(0))


def _taps_fake(x, taps, initial_state, bounds, output_final_state):  # type: ignore[no-untyped-def]
    final_state = x.new_empty(0)
    if output_final_state:
        rows = x.shape[0] if bounds is None else bounds.shape[0] - 1
        final_state = x.new_empty(rows, taps.shape[1] - 1, x.shape[2])
    return x.new_empty(x.shape), final_state


LONG_CONVOLUTION = OpaqueOperator(
    "longspan::long_convolution",
    "Tensor x, Tensor taps, Tensor? initial_state, Tensor? bounds, bool output_final_state",
    2,
    _taps,
    _taps_fake,
)


def _exponentials(
    x: Tensor,
    log_decay: Tensor,
    coefficients: Tensor,
    initial_state: Tensor | None,
    bounds: Tensor | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor]:
    """y, and the final state (empty where it is not wanted)."""
    from longspan.attention.long_convolution.kernels import ExponentialKernel
    from longspan.attention.long_convolution.operator import long_conv1d

    kernel, layout = ExponentialKernel(log_decay, coefficients), layout_of(x, bounds)
    found = long_conv1d(x, kernel, initial_state=initial_state, output_final_state=output_final_state, layout=layout)
    return found if isinstance(found, tuple) else (found, x.new_empty(0))


def _exponentials_fake(x, log_decay, coefficients, initial_state, bounds, output_final_state):  # type: ignore[no-untyped-def]
    final_state = x.new_empty(0)
    if output_final_state:
        rows = x.shape[0] if bounds is None else bounds.shape[0] - 1
        final_state = x.new_empty(rows, *log_decay.shape, dtype=state_dtype(x, log_decay))
    return x.new_empty(x.shape), final_state


EXPONENTIALS = OpaqueOperator(
    "longspan::exponentials",
    "Tensor x, Tensor log_decay, Tensor coefficients, Tensor? initial_state, Tensor? bounds, bool output_final_state",
    2,
    _exponentials,
    _exponentials_fake,
)


def state_dtype(x: Tensor, log_decay: Tensor) -> torch.dtype:
    """Of the state of a convolution of x with exponentials."""
    real = accumulation_dtype(x.dtype)
    return torch.promote_types(real, torch.complex64) if log_decay.is_complex() else real
