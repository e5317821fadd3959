"""Inputs and references for tests that run over every variant of linear attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

import longspan
from longspan.dtypes import accumulation_dtype
from longspan.layout import SequenceLayout
from longspan.ops.gates import Gate, Gates
from longspan.ops.variants import VARIANTS

LOW_RANK = {"a": 1.0, "b": 0.5, "p": 0.5}
"""Lengths of the vectors of a low-rank transition."""

NUM_SLOTS = 4
"""M of the operators that have slots."""


@dataclass
class Inputs:
    """Global inputs of one call, and random gradients for what it returns."""

    q: Tensor
    k: Tensor
    v: Tensor
    gates: dict[str, Any]
    initial_state: Tensor
    grad_o: Tensor
    grad_final: Tensor
    documents: list[int] | None
    scale: float = 0.7
    differentiable: list[str] = field(default_factory=list)

    def leaves(self) -> list[Tensor]:
        """What takes a gradient: q, k, v, the initial state, gates."""
        return [self.q, self.k, self.v, self.initial_state, *(self.gates[name] for name in self.differentiable)]

    def leaf_names(self) -> list[str]:
        return ["q", "k", "v", "initial_state", *self.differentiable]


def make_inputs(
    name: str,
    seq_len: int,
    *,
    documents: list[int] | None = None,
    batch: int = 1,
    heads: int = 2,
    key_heads: int | None = None,
    key_size: int = 3,
    value_size: int = 5,
    num_steps: int = 2,
    num_slots: int = NUM_SLOTS,
    dtype: torch.dtype = torch.float64,
    decay: float = 0.3,
    seed: int = 0,
) -> Inputs:
    """Random inputs; log decays are uniform in (−decay, 0], other gates in (0, 1), keys have unit length.

    Vectors that transitions are made of have random directions and the lengths of `LOW_RANK`.

    num_steps, num_slots: of a token, and of a state, for variants that have them.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    key_heads = heads if key_heads is None else key_heads
    sizes = {"B": batch, "T": seq_len, "N": num_steps, "H": heads, "K": key_size, "M": num_slots}
    state_size = VARIANTS[name].state_size(key_size, value_size, num_slots)
    steps = (num_steps,) if VARIANTS[name].has_steps else ()

    def gate_values(gate: Gate) -> Tensor:
        shape = [sizes[dim] for dim in gate.dims]
        if gate.name in LOW_RANK:
            # Of a length at which products of many transitions neither vanish nor grow without end.
            directions = torch.nn.functional.normalize(normal(*shape, dtype=torch.float64).detach(), dim=-1)
            return (LOW_RANK[gate.name] * directions).to(accumulation_dtype(dtype)).requires_grad_()
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
        values = -decay * uniform if gate.is_log_decay else uniform
        return values.to(accumulation_dtype(dtype)).requires_grad_(gate.differentiable)

    num_states = batch if documents is None else len(documents) - 1
    keys = normal(batch, seq_len, *steps, key_heads, key_size).detach()
    return Inputs(
        q=normal(batch, seq_len, key_heads, key_size),
        k=(keys / keys.norm(dim=-1, keepdim=True)).requires_grad_(),
        v=normal(batch, seq_len, *steps, heads, value_size),
        gates={gate.name: gate_values(gate) for gate in VARIANTS[name].gates},
        initial_state=normal(num_states, heads, *state_size, dtype=accumulation_dtype(dtype)),
        grad_o=normal(batch, seq_len, heads, value_size).detach(),
        grad_final=normal(num_states, heads, *state_size, dtype=accumulation_dtype(dtype)).detach(),
        documents=documents,
        differentiable=[gate.name for gate in VARIANTS[name].gates if gate.differentiable],
    )


def reference(name: str, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """o and final state by the recurrent form, document by document, in float64 whatever the inputs are."""
    variant = VARIANTS[name]
    repeats = inputs.v.shape[-2] // inputs.k.shape[-2]
    q, k = (x.double().repeat_interleave(repeats, dim=-2) for x in (inputs.q, inputs.k))
    v, initial = inputs.v.double(), inputs.initial_state.double()
    bounds = inputs.documents or [0, v.shape[1]]
    outputs, finals = [], []
    for number, (start, stop) in enumerate(pairwise(bounds)):
        gates = {gate.name: _rows(inputs.gates[gate.name].double(), gate, start, stop) for gate in variant.gates}
        state = initial if inputs.documents is None else initial[number : number + 1]
        o, final = variant.recurrent(q[:, start:stop], k[:, start:stop], v[:, start:stop], gates, inputs.scale, state)
        outputs.append(o)
        finals.append(final)
    return torch.cat(outputs, dim=1), torch.cat(finals)


@dataclass(frozen=True)
class Expected:
    """What the recurrent form makes of a call. No test changes any of it: others are given the same tensors.

    grads: of ``Σ o · grad_o + weight Σ final_state · grad_final``, as `Inputs.leaves` has them.
    """

    inputs: Inputs
    o: Tensor
    final_state: Tensor
    grads: tuple[Tensor, ...]


@lru_cache(maxsize=512)
def expected_of(name: str, seq_len: int, documents: tuple[int, ...] | None, weight: float, **options: Any) -> Expected:
    """The answer to `make_inputs` with these options, kept for the tests of other topologies, layouts and forms.

    The recurrent form takes longer than all that it is compared with, and every rank needs it.
    """
    inputs = make_inputs(name, seq_len, documents=None if documents is None else list(documents), **options)
    o, final_state = reference(name, inputs)
    loss = (o * inputs.grad_o).sum() + weight * (final_state * inputs.grad_final).sum()
    return Expected(inputs, o.detach(), final_state.detach(), torch.autograd.grad(loss, inputs.leaves()))


def _rows(x: Tensor, gate: Gate, start: int, stop: int) -> Tensor:
    return x[:, start:stop] if "T" in gate.dims else x


def operator_of(name: str) -> Callable[..., Any]:
    """The public function of a variant, which takes its gates by name."""
    found: Callable[..., Any] = getattr(longspan, {"gla_with_bonus": "gla"}.get(name, name))
    return found


def shard_gates(name: str, gates: Gates, layout: SequenceLayout) -> dict[str, Any]:
    """Gates as the rank of `layout` holds them."""
    return {
        gate.name: layout.shard(gates[gate.name]) if "T" in gate.dims else gates[gate.name]
        for gate in VARIANTS[name].gates
    }
