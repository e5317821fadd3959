"""Errors of a variant beside those of its recurrence in the same dtype, both against the recurrence in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import longspan
from longspan.dtypes import accumulation_dtype
from longspan.ops.variants import VARIANTS
from tests.compare import relative_error
from tests.variants import NUM_SLOTS

GATES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "0 to -0.1": lambda x: -0.1 * x,
    "0 to -1": lambda x: -x,
    "-5.9 to -6": lambda x: -5.9 - 0.1 * x,
    "0 to -20": lambda x: -20.0 * x,
    "0 to -1, one -1000": lambda x: _reset(-x, -1e3, 70, 10**6),
    "0 to -1, 17 times -1000": lambda x: _reset(-x, -1e3, 2, 6),
    "0 to -1, one -inf": lambda x: _reset(-x, -torch.inf, 70, 10**6),
    "0 to -1, 17 times -inf": lambda x: _reset(-x, -torch.inf, 2, 6),
    "0 to -0.1, 17 times -1000": lambda x: _reset(-0.1 * x, -1e3, 2, 6),
}
"""Log decays from numbers in [0, 1), ``[B, T, ...]``."""


def _reset(g: Tensor, value: float, first: int, step: int) -> Tensor:
    g = g.clone()
    g[:, first::step] = value
    return g


def make(name: str, gates: str, dtype: torch.dtype, seq_len: int = 100) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs by name and upstream gradients, all of which `dtype` holds exactly; B = 1, H = 2, K = V = 16."""
    generator = torch.Generator().manual_seed(0)
    heads, size = 2, 16

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    sizes = {"B": 1, "T": seq_len, "H": heads, "K": size, "M": NUM_SLOTS}
    state_size = VARIANTS[name].state_size(size, size, NUM_SLOTS)
    keys = normal(1, seq_len, heads, size)
    inputs = {"q": normal(1, seq_len, heads, size), "k": keys / keys.norm(dim=-1, keepdim=True)}
    inputs |= {"v": normal(1, seq_len, heads, size), "initial_state": normal(1, heads, *state_size)}
    for gate in VARIANTS[name].gates:
        uniform = torch.rand([sizes[dim] for dim in gate.dims], generator=generator, dtype=torch.float64)
        if gate.is_log_decay:
            in_time = uniform if "T" in gate.dims else uniform[None]
            uniform = GATES[gates](in_time) if "T" in gate.dims else GATES[gates](in_time)[0]
        inputs[gate.name] = uniform.to(dtype)
    upstream = {"o": normal(1, seq_len, heads, size), "final": normal(1, heads, *state_size)}
    return inputs, upstream


def _gradients(name: str, x: dict[str, Tensor], o: Tensor, final: Tensor, up: dict[str, Tensor]) -> dict[str, Tensor]:
    constant = [gate.name for gate in VARIANTS[name].gates if not gate.differentiable]
    leaves = {key: value for key, value in x.items() if key not in constant}
    loss = (o * up["o"].to(o.dtype)).sum() + (final * up["final"].to(final.dtype)).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"o": o, "final": final} | {f"d{key}": grad for key, grad in zip(leaves, grads, strict=True)}


def _leaves(name: str, inputs: dict[str, Tensor], dtype: Callable[[str], torch.dtype]) -> dict[str, Tensor]:
    gates = {gate.name: gate.differentiable for gate in VARIANTS[name].gates}
    return {key: x.detach().to(dtype(key)).requires_grad_(gates.get(key, True)) for key, x in inputs.items()}


def by_recurrence(
    name: str, inputs: dict[str, Tensor], upstream: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Outputs and gradients of the recurrence, all in `dtype`."""
    x = _leaves(name, inputs, lambda key: dtype)
    gates = {gate.name: x[gate.name] for gate in VARIANTS[name].gates}
    o, final = VARIANTS[name].recurrent(x["q"], x["k"], x["v"], gates, 0.25, x["initial_state"])
    return _gradients(name, x, o, final, upstream)


def by_chunks(
    name: str, inputs: dict[str, Tensor], upstream: dict[str, Tensor], dtype: torch.dtype, backend: str
) -> dict[str, Tensor]:
    """Outputs and gradients of the operator; states and gates in the dtype of states."""
    x = _leaves(name, inputs, lambda key: dtype if key in ("q", "k", "v") else accumulation_dtype(dtype))
    gates = {gate.name: x[gate.name] for gate in VARIANTS[name].gates}
    options: dict[str, Any] = {
        **gates,
        "initial_state": x["initial_state"],
        "output_final_state": True,
        "backend": backend,
    }
    memory = longspan.write(name, x["k"], x["v"], **options)
    return _gradients(name, x, memory.read(x["q"], 0.25), memory.final_state(), upstream)


def errors(name: str, gates: str, dtype: torch.dtype, backend: str) -> dict[str, tuple[float, float]]:
    """For each output and gradient the error of the operator, and of the recurrence in `dtype`."""
    inputs, upstream = make(name, gates, dtype)
    exact = by_recurrence(name, inputs, upstream, torch.float64)
    ours, theirs = by_chunks(name, inputs, upstream, dtype, backend), by_recurrence(name, inputs, upstream, dtype)
    return {key: (relative_error(ours[key], want), relative_error(theirs[key], want)) for key, want in exact.items()}
