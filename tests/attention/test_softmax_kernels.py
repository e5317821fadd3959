"""The block kernels: any block's output, log-sum-exp and gradients, and the private operators they stand on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longspan.ops.softmax import block as kernels
from tests.attention.softmax_reference import random_inputs
from tests.compare import relative_error

TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2}


@pytest.fixture(params=["cpu", "plain"])
def operator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to run a block on the CPU, with keys and queries few and many."""
    monkeypatch.setattr(kernels, "MANY_KEYS", 200)
    monkeypatch.setattr(kernels, "FEW_QUERIES", 2)
    monkeypatch.setattr(kernels, "flash_operator", lambda q: request.param)
    return request.param


@pytest.mark.parametrize("name", kernels.SCHEMAS)
def test_private_operators_have_the_schema_they_are_called_with(name: str) -> None:
    installed = str(getattr(torch.ops.aten, name).default._schema)
    assert installed == f"aten::{name}{kernels.SCHEMAS[name]}"


def test_the_cpu_runs_its_flash_operator_for_every_dtype() -> None:
    for dtype in (*TOLERANCES, torch.float16):
        assert kernels.flash_operator(torch.empty(1, 1, 1, 8, dtype=dtype)) == "cpu"


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize(
    ("lengths", "causal"),
    [((1, 1), True), ((131, 131), True), ((131, 131), False), ((2, 260), False), ((3, 260), False), ((260, 3), False)],
)
def test_a_block_equals_dense_attention(
    operator: str, dtype: torch.dtype, heads: int, kv_heads: int, lengths: tuple[int, int], causal: bool
) -> None:
    num_queries, num_keys = lengths
    tokens = max(lengths)
    inputs = random_inputs(0, 2, tokens, heads, kv_heads, 12, dtype)
    q, k, v, grad_out = (x[:, :n] for x, n in zip(inputs, (num_queries, num_keys, num_keys, num_queries), strict=True))

    out, lse = kernels.block_forward(q, k, v, causal=causal, scale=0.3)
    grads = kernels.block_backward(grad_out, q, k, v, out, lse, causal=causal, scale=0.3)

    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    want_out, want_lse = _dense(*leaves, causal=causal, scale=0.3)
    want_grads = torch.autograd.grad(want_out, leaves, grad_out.double())
    assert out.dtype == dtype
    assert lse.dtype == torch.promote_types(dtype, torch.float32)
    # The weight of a single key is 1 whatever its score: neither query nor key has a gradient.
    floors = [0.0, 0.0, *([1.0, 1.0] if num_keys == 1 else [0.0, 0.0]), 0.0]
    for got, want, floor in zip((out, lse, *grads), (want_out, want_lse, *want_grads), floors, strict=True):
        _close(got, want, dtype, floor)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("dim", "value_dim"), [(12, 8), (8, 12), (3, 1)])
def test_a_block_takes_values_of_another_size(operator: str, dtype: torch.dtype, dim: int, value_dim: int) -> None:
    q, k, v, grad_out = random_inputs(0, 2, 131, 4, 2, dim, dtype, value_dim)
    out, lse = kernels.block_forward(q, k, v, causal=True, scale=0.3)
    grads = kernels.block_backward(grad_out, q, k, v, out, lse, causal=True, scale=0.3)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    want, want_lse = _dense(*leaves, causal=True, scale=0.3)
    want_grads = torch.autograd.grad(want, leaves, grad_out.double())
    assert out.untyped_storage().nbytes() == out.numel() * out.element_size()
    for got, expected in zip((out, lse, *grads), (want, want_lse, *want_grads), strict=True):
        assert got.shape == expected.shape
        _close(got, expected, dtype)


def test_blocks_merged_by_log_sum_exp_have_exact_gradients(operator: str) -> None:
    q, k, v, grad_out = random_inputs(1, 2, 40, 4, 2, 8)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    want, want_lse = _dense(*leaves, causal=False, scale=0.5)
    want_grads = torch.autograd.grad(want, leaves, grad_out)
    dq = torch.zeros_like(q)
    for keys in (slice(0, 13), slice(13, 40)):
        block = kernels.block_backward(
            grad_out, q, k[:, keys], v[:, keys], want.detach(), want_lse.detach(), causal=False, scale=0.5
        )
        dq += block[0]
        _close(block[1], want_grads[1][:, keys], torch.float64)
        _close(block[2], want_grads[2][:, keys], torch.float64)
    _close(dq, want_grads[0], torch.float64)


@pytest.mark.parametrize("tokens", [1, 7])
def test_gradients_and_inputs_with_awkward_strides_are_right(operator: str, tokens: int) -> None:
    q, k, v, _ = random_inputs(2, 2, tokens, 4, 2, 8)
    out, lse = kernels.block_forward(q, k, v, causal=True, scale=0.5)
    expanded = torch.tensor(0.7, dtype=torch.float64).expand_as(out)
    last_strided = torch.stack([k, k], dim=-1)[..., 0]
    packed = torch.stack([v, v], dim=2).permute(1, 0, 2, 3, 4).contiguous().transpose(0, 1).select(2, 1)
    got = kernels.block_backward(expanded, q, last_strided, packed, out, lse, causal=True, scale=0.5)
    want = kernels.block_backward(expanded.clone(), q, k, v, out, lse, causal=True, scale=0.5)
    for x, y in zip(got, want, strict=True):
        _close(x, y, torch.float64)


def _dense(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), float("-inf"))
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v), scores.logsumexp(-1)


def _close(got: Tensor, want: Tensor, dtype: torch.dtype, floor: float = 0.0) -> None:
    error = relative_error(got, want, floor)
    assert error <= TOLERANCES[dtype], error
