"""Digits of the delta family: errors against float64 beside those of the recurrence token by token in the same dtype.

Outputs, final states and every gradient, for gates from none to −inf, keys that repeat or resemble each other, and β up to 2.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import longspan
from longspan import SequenceLayout
from longspan.ops.variants import VARIANTS
from tests.compare import relative_error, worst
from tests.variants import Inputs, make_inputs

SEQ_LEN, SIZE = 200, 16
KEYS = ("random", "equal", "nearly equal", "repeated")
UP_TO_1 = "beta up to 1"
BETAS: dict[str, tuple[tuple[float, float], ...]] = {
    UP_TO_1: ((0.0, 0.0), (0.0, 1.0), (1.0, 1.0)),
    "beta up to 2": ((0.0, 2.0), (1.9, 1.9), (1.9, 2.0), (2.0, 2.0)),
}
GATES: dict[str, tuple[float, float, int, float]] = {
    "g in [-0.1, 0]": (-0.1, 0.0, 0, 0.0),
    "g in [-1, 0]": (-1.0, 0.0, 0, 0.0),
    "g in [-6, -5.9]": (-6.0, -5.9, 0, 0.0),
    "g in [-20, 0]": (-20.0, 0.0, 0, 0.0),
    "one reset of -1e3": (-0.1, 0.0, 1, -1e3),
    "17 resets of -1e3": (-0.1, 0.0, 17, -1e3),
    "one reset of -inf": (-0.1, 0.0, 1, -torch.inf),
    "17 resets of -inf": (-0.1, 0.0, 17, -torch.inf),
}
CASES = [("delta_rule", "no decay")] + [(name, gates) for name in ("gated_delta_rule", "kda") for gates in GATES]
OF_ROWS = [(name, gates) for name in ("gated_delta_product", "dplr_delta_rule", "comba") for gates in GATES]
"""Operators whose tokens have several rows, or that read before they decay."""


def heads_of(name: str, key: str) -> int:
    """The dimension of the heads of an input, an output or a gradient."""
    if key in ("final", "initial_state"):
        return 1
    of_gate = {gate.name: gate.dims.index("H") for gate in VARIANTS[name].gates}
    return of_gate.get(key, 3 if VARIANTS[name].has_steps and key in ("k", "v") else 2)


def made(name: str, gates: str, strengths: tuple[tuple[float, float], ...], dtype: torch.dtype) -> Inputs:
    """Inputs of one call, in which every kind of keys with every range of β is a head."""
    heads = len(KEYS) * len(strengths)
    inputs = make_inputs(name, SEQ_LEN, heads=heads, key_size=SIZE, value_size=SIZE, dtype=dtype)
    generator = torch.Generator().manual_seed(1)

    def uniform(shape: torch.Size, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)

    # RWKV-7 has a strength for each channel of the key that it removes.
    strength = "b" if name == "dplr_delta_rule" else "beta"
    keys, beta = inputs.k.detach().double(), inputs.gates[strength].detach().double()
    for head in range(heads):
        own = keys.select(heads_of(name, "k"), head)
        noise = torch.randn(own.shape, generator=generator, dtype=torch.float64)
        own.copy_(
            {
                "random": own,
                "equal": own[:, :1].expand_as(own),
                "nearly equal": own[:, :1] + 1e-3 * noise,
                "repeated": own[:, torch.arange(SEQ_LEN) % 5],
            }[KEYS[head % len(KEYS)]]
        )
        own_strength = beta.select(heads_of(name, strength), head)
        own_strength.copy_(uniform(own_strength.shape, *strengths[head // len(KEYS)]))
    keys = keys / keys.norm(dim=-1, keepdim=True)
    new = {"k": keys} if name != "dplr_delta_rule" else {"a": -keys, "b": keys * beta}
    new |= {"beta": beta} if name != "dplr_delta_rule" else {}
    new |= {"p": keys} if name == "comba" else {}
    for item, x in new.items():
        if item == "k":
            inputs.k = x.to(dtype).requires_grad_()
        else:
            inputs.gates[item] = x.to(inputs.gates[item].dtype).requires_grad_()
    if gates in GATES:
        low, high, resets, value = GATES[gates]
        g = uniform(inputs.gates["g"].shape, low, high)
        g[:, torch.randperm(SEQ_LEN, generator=generator)[:resets]] = value
        inputs.gates["g"] = g.to(inputs.gates["g"].dtype).requires_grad_()
    return inputs


def results(name: str, inputs: Inputs, form: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Outputs and gradients of the chunk form, or of the recurrence with everything in `dtype`."""
    leaves = inputs.leaves()
    if form == "chunks":
        o, final = getattr(longspan, name)(
            *(inputs.q, inputs.k, inputs.v),
            **inputs.gates,
            scale=inputs.scale,
            initial_state=inputs.initial_state,
            output_final_state=True,
        )
    else:
        assert dtype is not None
        gates = {key: x.to(dtype) for key, x in inputs.gates.items()}
        q, k, v, state = (x.to(dtype) for x in (inputs.q, inputs.k, inputs.v, inputs.initial_state))
        o, final = VARIANTS[name].recurrent(q, k, v, gates, inputs.scale, state)
        if dtype != torch.float64:
            o = o.to(inputs.q.dtype)
    loss = (o.double() * inputs.grad_o.double()).sum() + (final.double() * inputs.grad_final.double()).sum()
    if dtype == torch.float64:
        # Gradients as they are, not rounded to the dtype of the inputs.
        doubles: Any = [x.detach().double().requires_grad_() for x in leaves]
        gates = dict(zip(inputs.differentiable, doubles[4:], strict=True))
        moved = replace(
            inputs, q=doubles[0], k=doubles[1], v=doubles[2], gates=gates, initial_state=doubles[3], documents=None
        )
        o, final = VARIANTS[name].recurrent(moved.q, moved.k, moved.v, moved.gates, moved.scale, moved.initial_state)
        loss = (o * inputs.grad_o.double()).sum() + (final * inputs.grad_final.double()).sum()
        leaves = moved.leaves()
    gradients = torch.autograd.grad(loss, leaves)
    return {"o": o, "final": final, **dict(zip(inputs.leaf_names(), gradients, strict=True))}


# Resets of either size on one of the two.
@pytest.mark.slow_rows(r"^gated_delta_rule-(one|17) resets? of -inf", r"^kda-(one|17) resets? of -1e3")
@pytest.mark.slow_rows(r"^(gated_delta_rule|kda)-.*beta up to 1", r"^(?!delta_rule-no decay-beta up to 1-).*-dtype1$")
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^gated_delta_rule-(g in \[-(0[.]1|1),|17 resets)", r"^kda-(17 resets|g in \[-(6|20),)")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strengths", BETAS)
@pytest.mark.parametrize(("name", "gates"), CASES)
def test_chunks_keep_the_digits_of_the_recurrence(name: str, gates: str, strengths: str, dtype: torch.dtype) -> None:
    check_digits(name, gates, strengths, dtype)


@pytest.mark.slow_rows(r"beta up to 1-")
# A decay that is not applied to what is taken off makes a factor above 1 of a β above 1.
@pytest.mark.slow_rows(r"^(comba|gated_delta_product)-(g in \[-1, 0|g in \[-20|one reset|17 resets of -inf)")
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^gated_delta_product-g in \[-0[.]1,")
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("name", "gates", "strengths"),
    [
        (*case, strengths)
        for case in OF_ROWS
        for strengths in (BETAS if case[0] == "gated_delta_product" else [UP_TO_1])
    ],
)
def test_rows_keep_the_digits_of_the_recurrence(name: str, gates: str, strengths: str, dtype: torch.dtype) -> None:
    check_digits(name, gates, strengths, dtype)


def check_digits(name: str, gates: str, strengths: str, dtype: torch.dtype) -> None:
    inputs = made(name, gates, BETAS[strengths], dtype)
    exact = results(name, inputs, "recurrence", torch.float64)
    token_by_token = results(name, inputs, "recurrence", torch.float32)
    got = results(name, inputs, "chunks")
    few = 4 * torch.finfo(dtype).eps if dtype == torch.float32 else torch.finfo(dtype).eps
    for head in range(len(KEYS) * len(BETAS[strengths])):
        excess = {}
        for key, want in exact.items():
            dim = heads_of(name, key)
            ours, theirs, want = (x.select(dim, head) for x in (got[key], token_by_token[key], want))
            excess[key] = relative_error(ours, want, floor=1e-30) / (
                3 * relative_error(theirs, want, floor=1e-30) + few
            )
        label = (KEYS[head % len(KEYS)], BETAS[strengths][head // len(KEYS)])
        # What passes a token and what it erases of that nearly cancel in the gradient of g: see docs/design.md.
        assert excess.pop("g", 0.0) <= (4.0 if dtype == torch.float32 else 1.0), label
        if name == "gated_delta_product":
            # Two reflections for a decay: more of what a chunk is given passes it, and takes its roundings with it.
            assert excess.pop("initial_state") <= 1.5, label
        assert worst(excess) <= 1.0, (label, excess)


@pytest.mark.parametrize(
    ("name", "gates"), [("delta_rule", "no decay"), ("gated_delta_rule", "g in [-0.1, 0]"), ("kda", "g in [-0.1, 0]")]
)
def test_keys_that_repeat_in_documents_whose_last_chunks_are_computed_together(name: str, gates: str) -> None:
    """Such chunks are solved in float64, and kept in float32 with those of other documents."""
    bounds = [0, 30, 70, SEQ_LEN]
    inputs = made(name, gates, BETAS["beta up to 2"], torch.float32)

    def call(start: int, stop: int, layout: SequenceLayout | None) -> list[Tensor]:
        leaves = [x.detach()[:, start:stop].clone().requires_grad_() for x in inputs.leaves() if x.shape[1] == SEQ_LEN]
        q, k, v, *given = leaves
        gates = dict(zip(inputs.differentiable, given, strict=True))
        o = getattr(longspan, name)(q, k, v, **gates, layout=layout)
        return [o, *torch.autograd.grad(o, leaves, inputs.grad_o[:, start:stop])]

    packed = call(0, SEQ_LEN, SequenceLayout.local(SEQ_LEN, bounds))
    for start, stop in pairwise(bounds):
        alone = call(start, stop, None)
        assert worst([relative_error(x[:, start:stop], y) for x, y in zip(packed, alone, strict=True)]) < 1e-4
