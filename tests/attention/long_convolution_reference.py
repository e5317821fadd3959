"""What a long convolution is: token by token, tap by tap, document by document, in plain PyTorch; and inputs for its tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

import longspan

Documents = list[int] | None
Leaves = Mapping[str, Tensor]


@dataclass(frozen=True)
class Kind:
    """A kind of kernel: its parameters by name, of C channels; how the operator takes them; its taps, one by one.

    state: the shape of a state of one document, without channels, of a kernel of K taps; and its dtype's kind.
    """

    parameters: Callable[[int, int], dict[str, Tensor]]
    kernel: Callable[[Leaves, int], Any]
    tap: Callable[[Leaves, int], Tensor]
    exponentials: bool = False


def _normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _taps(num_channels: int, num_taps: int) -> dict[str, Tensor]:
    return {"taps": _normal(num_channels, num_taps, seed=1)}


def _real(num_channels: int, _: int) -> dict[str, Tensor]:
    rates = torch.tensor([0.0, 0.01, 0.3, 3.0]).double()
    spread = 1 + torch.arange(num_channels).double()[:, None] / 10
    return {"log_decay": -rates * spread, "coefficients": _normal(num_channels, 4, seed=2)}


def _complex(num_channels: int, _: int) -> dict[str, Tensor]:
    rates = torch.tensor([0.0, 0.02, 1.0]).double().expand(num_channels, 3)
    turns = _normal(num_channels, 3, seed=3)
    return {
        "log_decay": torch.complex(-rates, turns),
        "coefficients": _normal(num_channels, 3, seed=4, dtype=torch.complex128),
    }


def _network(num_channels: int, _: int) -> dict[str, Tensor]:
    return {"inner": _normal(5, seed=5), "outer": _normal(num_channels, 5, seed=6)}


def _function(leaves: Leaves, num_taps: int) -> Any:
    def taps(lags: Tensor, channels: range) -> Tensor:
        features = torch.sin(lags.to(torch.float64)[:, None] * leaves["inner"].double() + 0.5)
        outer = leaves["outer"].double()[channels.start : channels.stop]
        return (outer @ features.t()).to(leaves["outer"].dtype)

    return longspan.FunctionKernel(taps, num_taps)


def _exponential_kernel(leaves: Leaves) -> longspan.ExponentialKernel:
    return longspan.ExponentialKernel(leaves["log_decay"], leaves["coefficients"])


def _exponential_tap(leaves: Leaves, lag: int) -> Tensor:
    terms = leaves["coefficients"] * (leaves["log_decay"] * lag).exp()
    return terms.sum(-1).real if terms.is_complex() else terms.sum(-1)


KINDS = {
    "taps": Kind(_taps, lambda leaves, num_taps: leaves["taps"], lambda leaves, lag: leaves["taps"][:, lag]),
    "function": Kind(
        _network, _function, lambda leaves, lag: (leaves["outer"] * (leaves["inner"] * lag + 0.5).sin()).sum(-1)
    ),
    "exponentials": Kind(_real, lambda leaves, _: _exponential_kernel(leaves), _exponential_tap, True),
    "complex exponentials": Kind(_complex, lambda leaves, _: _exponential_kernel(leaves), _exponential_tap, True),
}


def inputs(
    kind: str, seq_len: int, num_taps: int, documents: Documents, num_channels: int, batch: int
) -> dict[str, Tensor]:
    """x, the kernel's parameters, an initial state, and random gradients of y and of the final state, in float64."""
    parameters = KINDS[kind].parameters(num_channels, num_taps)
    num_states = batch if documents is None else len(documents) - 1
    shape, dtype = (num_states, num_taps - 1, num_channels), torch.float64
    if KINDS[kind].exponentials:
        shape, dtype = (num_states, *parameters["log_decay"].shape), parameters["log_decay"].dtype
    return {
        "x": _normal(batch, seq_len, num_channels, seed=10),
        **parameters,
        "initial_state": _normal(*shape, seed=11, dtype=dtype),
        "grad_y": _normal(batch, seq_len, num_channels, seed=12),
        "grad_final": _normal(*shape, seed=13, dtype=dtype),
    }


def definition(
    kind: str, x: Tensor, leaves: Leaves, num_taps: int, documents: Documents, initial: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y and the final state."""
    outputs, finals = [], []
    for number, (start, stop) in enumerate(pairwise(documents or [0, x.shape[1]])):
        own = None if initial is None else (initial if documents is None else initial[number : number + 1])
        tokens = x[:, start:stop]
        found, final = (_recurrent if KINDS[kind].exponentials else _tapped)(kind, tokens, leaves, num_taps, own)
        outputs.append(found)
        finals.append(final)
    return torch.cat(outputs, dim=1), torch.cat(finals)


def _tapped(kind: str, x: Tensor, leaves: Leaves, num_taps: int, initial: Tensor | None) -> tuple[Tensor, Tensor]:
    width = num_taps - 1
    before = x.new_zeros(x.shape[0], width, x.shape[2]) if initial is None else initial
    tokens = torch.cat([before, x], dim=1)
    y = torch.zeros_like(x)
    for lag in range(num_taps):
        y = y + KINDS[kind].tap(leaves, lag) * tokens[:, width - lag : width - lag + x.shape[1]]
    return y, tokens[:, x.shape[1] :]


def _recurrent(kind: str, x: Tensor, leaves: Leaves, _: int, initial: Tensor | None) -> tuple[Tensor, Tensor]:
    a, c = leaves["log_decay"], leaves["coefficients"]
    state = torch.zeros(x.shape[0], *a.shape, dtype=a.dtype) if initial is None else initial
    rows = []
    for t in range(x.shape[1]):
        state = a.exp() * state + x[:, t, :, None]
        y = (c * state).sum(-1)
        rows.append(y.real if y.is_complex() else y)
    return torch.stack(rows, dim=1), state
