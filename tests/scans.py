"""Inputs and the reference of `selective_scan`, for tests on one device and on ranks."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

import longspan
from longspan.layout import SequenceLayout
from longspan.ops.selective_scan.recurrent import selective_scan_recurrent

PER_TOKEN = ("u", "delta", "B", "C", "z")
"""Arguments that have a token dimension."""

Tensors = dict[str, Any]
"""Tensors by the names of arguments."""


def make_scan(
    seq_len: int,
    *,
    batch: int = 1,
    channels: int = 4,
    state_size: int = 3,
    groups: int | None = None,
    softplus: bool = True,
    step: float = 1.0,
    documents: list[int] | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[Tensors, Tensors]:
    """Random leaves of a call, initial_state among them, and the gradients of what it returns, ``o`` and ``final``.

    groups: None gives B and C without a dimension for them. step: size of the steps, or of their logits.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    wide = dtype if dtype == torch.float64 else torch.float32
    states = (batch if documents is None else len(documents) - 1, channels, state_size)
    of_groups = (state_size,) if groups is None else (groups, state_size)
    delta = step * normal(batch, seq_len, channels, dtype=wide)
    values = {
        "u": normal(batch, seq_len, channels),
        "delta": delta if softplus else delta.abs(),
        "A": -normal(channels, state_size, dtype=wide).exp(),
        "B": normal(batch, seq_len, *of_groups),
        "C": normal(batch, seq_len, *of_groups),
        "D": normal(channels, dtype=wide),
        "z": normal(batch, seq_len, channels),
        "initial_state": normal(*states, dtype=wide),
    }
    if softplus:
        values["delta_bias"] = normal(channels, dtype=wide)
    grads = {"o": normal(batch, seq_len, channels), "final": normal(*states, dtype=wide)}
    return {name: x.requires_grad_() for name, x in values.items()}, grads


def reference(values: Tensors, softplus: bool = True, documents: list[int] | None = None) -> tuple[Tensor, Tensor]:
    """o and the final states by the recurrent form, document by document, in float64."""
    x = {name: value.double() for name, value in values.items()}
    for name in ("B", "C"):
        x[name] = x[name].unsqueeze(2) if x[name].dim() == 3 else x[name]
    outputs, finals = [], []
    for number, (start, stop) in enumerate(pairwise(documents or [0, x["u"].shape[1]])):
        own: dict[str, Any] = {name: value[:, start:stop] if name in PER_TOKEN else value for name, value in x.items()}
        initial = own.pop("initial_state")
        own = {"D": None, "z": None, "delta_bias": None, **own}
        state = initial if documents is None else initial[number : number + 1]
        o, final = selective_scan_recurrent(**own, delta_softplus=softplus, initial_state=state)
        outputs.append(o)
        finals.append(final)
    return torch.cat(outputs, dim=1), torch.cat(finals)


@lru_cache(maxsize=128)
def expected_of_scan(
    seq_len: int, documents: tuple[int, ...] | None, weight: float, **options: Any
) -> tuple[Tensors, Tensors, Tensor, Tensor, tuple[Tensor, ...]]:
    """What `make_scan` makes of these options, o, the final states and all gradients, kept for other topologies and layouts.

    The gradients are of ``Σ o · grads["o"] + weight Σ final · grads["final"]``. No test changes any of it.
    """
    listed = None if documents is None else list(documents)
    values, grads = make_scan(seq_len, documents=listed, **options)
    o, final = reference(values, "delta_bias" in values, listed)
    loss = (o * grads["o"]).sum() + weight * (final * grads["final"]).sum()
    return values, grads, o.detach(), final.detach(), torch.autograd.grad(loss, list(values.values()))


def call(values: Tensors, softplus: bool = True, **options: Any) -> tuple[Tensor, Tensor]:
    """The operator with all that it returns."""
    return longspan.selective_scan(**values, delta_softplus=softplus, output_final_state=True, **options)


def shard(values: Tensors, layout: SequenceLayout) -> Tensors:
    """The leaves of this rank."""
    return {
        name: (layout.shard(x.detach()) if name in PER_TOKEN else x.detach()).clone().requires_grad_()
        for name, x in values.items()
    }
