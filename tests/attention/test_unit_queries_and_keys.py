"""`qk_l2norm` of the delta rules: queries and keys of length 1 reach the recurrence, on every rank, with every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import longspan
from longspan.errors import InputError
from longspan.layout import SequenceLayout
from tests.compare import relative_error, worst
from tests.ranks import run_on_ranks

GATES: dict[str, tuple[str, ...]] = {
    "delta_rule": ("beta",),
    "gated_delta_rule": ("g", "beta"),
    "kda": ("g", "beta"),
}
TOKENS, HEADS, SIZE = 19, 2, 4


def inputs_of(operator: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    normal = {name: torch.randn(1, TOKENS, HEADS, SIZE, generator=generator, dtype=torch.float64) for name in "qkv"}
    beta = torch.rand(1, TOKENS, HEADS, generator=generator, dtype=torch.float64)
    sizes = (SIZE,) if operator == "kda" else ()
    g = -torch.rand(1, TOKENS, HEADS, *sizes, generator=generator, dtype=torch.float64)
    return {**normal, **{name: {"g": g, "beta": beta}[name] for name in GATES[operator]}}


def recurrence(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None = None) -> Tensor:
    """S_t = e^{g_t} (I − β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ, with q and k over their own lengths; a g per channel comes first."""
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    state = torch.zeros(1, HEADS, SIZE, SIZE, dtype=torch.float64)
    outputs = []
    for t in range(TOKENS):
        if g is not None:
            state = (g[:, t].exp() if g.dim() == 4 else g[:, t, :, None].exp())[..., None] * state
        key, value, step = k[:, t], v[:, t], beta[:, t, :, None]
        read = torch.einsum("bhk,bhkv->bhv", key, state)
        state = state + (step * key)[..., None] * (value - read)[..., None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state) * SIZE**-0.5)
    return torch.stack(outputs, dim=1)


def errors(operator: str, order: Any) -> float:
    whole = {name: x.requires_grad_() for name, x in inputs_of(operator).items()}
    layout = SequenceLayout(TOKENS, order=order)
    own = {name: layout.shard(x.detach()).clone().requires_grad_() for name, x in whole.items()}
    upstream = torch.randn(1, TOKENS, HEADS, SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    want = recurrence(**whole)
    got = getattr(longspan, operator)(**own, qk_l2norm=True, layout=layout)
    want_grads = torch.autograd.grad(want, list(whole.values()), upstream)
    grads = torch.autograd.grad(got, list(own.values()), layout.shard(upstream))
    pairs = zip((got, *grads), (want, *want_grads), strict=True)
    return worst(relative_error(x, layout.shard(y)) for x, y in pairs)


@pytest.mark.parametrize("operator", GATES)
def test_it_equals_the_recurrence_of_unit_queries_and_keys(operator: str) -> None:
    assert worst(run_on_ranks(1, errors, operator, "contiguous")) <= 1e-12
    for order in ("contiguous", "zigzag"):
        assert worst(run_on_ranks(2, errors, operator, order)) <= 1e-12


@pytest.mark.parametrize("operator", GATES)
def test_it_is_the_feature_map_before_the_operator(operator: str) -> None:
    inputs = {name: x.bfloat16() if name in ("q", "k", "v") else x.float() for name, x in inputs_of(operator).items()}
    unit = {name: longspan.features.unit_length(inputs[name]) for name in ("q", "k")}
    call = getattr(longspan, operator)
    assert torch.equal(call(**inputs, qk_l2norm=True), call(**{**inputs, **unit}))


@pytest.mark.parametrize("operator", GATES)
def test_what_is_no_flag_is_refused(operator: str) -> None:
    for flag in (1, None, 1e-6):
        with pytest.raises(InputError, match=f"{operator}: qk_l2norm must be True or False"):
            getattr(longspan, operator)(**inputs_of(operator), qk_l2norm=flag)
    with pytest.raises(InputError, match=rf"{operator}: q must be a torch\.Tensor"):
        getattr(longspan, operator)(**{**inputs_of(operator), "q": 3}, qk_l2norm=True)
