"""What stands in for flash-linear-attention's functions, and its table, without the package; test_fla.py is of its models."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import longspan
from longspan.errors import InputError
from longspan.integrations.transformers import fla_functions, mixers
from longspan.integrations.transformers.call import RUNNING, ParallelCall
from longspan.integrations.transformers.fla_methods import rotary_of_positions
from longspan.models.mixers import ParallelOptions
from tests.compare import relative_error
from tests.ranks import run_on_ranks

BOUNDS = [0, 4, 5, 11]


def call_of(bounds: list[int] | None = None, num_tokens: int = 11) -> ParallelCall:
    return ParallelCall(longspan.SequenceLayout.local(num_tokens, bounds), ParallelOptions())


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotary(interleaved: bool, **options: Any) -> Any:
    frequencies = torch.tensor([1.0, 0.1, 0.01])
    given = {"scale": None, "pos_idx_in_fp32": True, "inv_freq": frequencies, "interleaved": interleaved}
    return SimpleNamespace(**{**given, "_compute_inv_freq": lambda device: frequencies, **options})


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_rotary_embedding_turns_by_the_position_in_the_document(interleaved: bool) -> None:
    q, k = random(1, 11, 2, 8), random(1, 11, 1, 8, seed=1)
    token = RUNNING.set(call := call_of(BOUNDS))
    try:
        call.mixer = nn.Identity()
        found = rotary_of_positions(rotary(interleaved), q, k, seqlen_offset=0, max_seqlen=11)
    finally:
        RUNNING.reset(token)
    assert call.taken[id(call.mixer)] == {mixers.ROTARY}
    positions = torch.cat([torch.arange(stop - start) for start, stop in pairwise(BOUNDS)])
    turn = torch.polar(torch.ones(11, 3), positions[:, None] * torch.tensor([1.0, 0.1, 0.01]))[:, None].to(
        torch.cdouble
    )
    for x, got in zip((q, k), found, strict=True):
        pairs = x[..., :6].unflatten(-1, (3, 2)) if interleaved else x[..., :6].unflatten(-1, (2, 3)).mT
        turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
        want = turned.flatten(-2) if interleaved else turned.mT.flatten(-2)
        assert relative_error(got, torch.cat([want, x[..., 6:]], dim=-1)) < 1e-6


def one_token_of(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    layout = longspan.SequenceLayout(x.shape[1])
    call = ParallelCall(layout, ParallelOptions())
    own, empty = layout.shard(x), x.new_zeros(len(x), x.shape[2], 4)
    triton, _ = fla_functions.FLA_FUNCTIONS["causal_conv1d_update"](
        call, x=own, cache=empty, weight=weight, bias=bias, activation="silu"
    )
    cuda = fla_functions.FLA_FUNCTIONS["causal_conv1d_update_cuda"](
        call, x=own.squeeze(1), conv_state=empty, weight=weight, bias=bias, activation="silu"
    )
    return layout.gather(triton), layout.gather(cuda.unsqueeze(1))


def test_a_convolution_of_one_token_has_those_of_other_ranks_before_it() -> None:
    x, weight, bias = random(2, 2, 3), random(3, 4, seed=1), random(3, seed=2)
    padded = F.pad(x.transpose(1, 2), (3, 0))
    want = F.silu(F.conv1d(padded, weight[:, None], bias, groups=3)).transpose(1, 2)
    for found in run_on_ranks(2, one_token_of, x, weight, bias):
        assert all(relative_error(got, want) < 1e-12 for got in found)


def test_gates_inside_of_kernels() -> None:
    g, rate = random(1, 5, 2), random(2, seed=1)
    bias = random(2, seed=2)
    want = -rate.exp() * torch.log1p(torch.exp(g + bias))
    assert relative_error(fla_functions._log_decays(g, rate, bias, None), want) < 1e-12
    g, bias = random(1, 5, 2, 3, seed=3), random(6, seed=4)
    want = -4.0 / (1.0 + torch.exp(-rate.exp()[:, None] * (g + bias.view(2, 3))))
    assert relative_error(fla_functions._log_decays(g, rate, bias, -4.0), want) < 1e-12
    want = -4.0 / (1.0 + torch.exp(-(g + bias.view(2, 3))))
    assert relative_error(fla_functions._log_decays(g, None, bias, -4.0), want) < 1e-12


@pytest.mark.parametrize(
    ("device", "dtype", "size", "backend"),
    [
        ("cuda", torch.bfloat16, 256, "fla"),
        ("cuda", torch.float16, 64, "fla"),
        ("cuda", torch.float32, 64, None),
        ("cuda", torch.bfloat16, 257, None),
        ("cpu", torch.bfloat16, 64, None),
    ],
)
def test_delta_rules_take_the_own_kernels_where_these_run(
    device: str, dtype: torch.dtype, size: int, backend: str | None
) -> None:
    q: Any = SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(1, 11, 2, size))
    assert fla_functions._own_kernels(q) == backend


@pytest.mark.parametrize("normalize", [False, True])
def test_linear_attention_is_divided_by_the_sum_of_its_weights(normalize: bool) -> None:
    # So small that what is added to the sum matters.
    q, k, v = 1e-6 * random(2, 11, 2, 3).abs(), 1e-4 * random(2, 11, 2, 3, seed=1).abs(), random(2, 11, 2, 4, seed=2)
    weights = torch.einsum("bthk,bshk->bhts", q, k).tril() * 3**-0.5
    want = torch.einsum("bhts,bshv->bthv", weights, v)
    if normalize:
        want = want / (weights.sum(-1).transpose(1, 2)[..., None] + 1e-10)
    got, _ = fla_functions.linear_attention(call_of(), q, k, v, normalize=normalize)
    assert relative_error(got, want) < 1e-10


def test_rwkv6_reads_the_state_before_the_token_and_its_own_part() -> None:
    r, k, v = random(1, 11, 2, 3), random(1, 11, 2, 3, seed=1), random(1, 11, 2, 4, seed=2)
    w, u = -random(1, 11, 2, 3, seed=3).exp(), random(2, 3, seed=4)
    wants = []
    for start, stop in pairwise(BOUNDS):
        state = r.new_zeros(1, 2, 3, 4)
        for t in range(start, stop):
            pair = k[:, t, :, :, None] * v[:, t, :, None]
            wants.append(0.7 * torch.einsum("bhk,bhkv->bhv", r[:, t], state + u[..., None] * pair))
            state = w[:, t, :, :, None].exp() * state + pair
    got, _ = fla_functions.rwkv6(call_of(BOUNDS), r, k, v, w, u, 0.7)
    assert relative_error(got, torch.stack(wants, dim=1)) < 1e-12


def test_a_window_of_flash_attention_has_one_token_more_than_it_says() -> None:
    q, k, v = (random(1, 11, 2, 4, seed=seed) for seed in range(3))
    distance = torch.arange(11)[:, None] - torch.arange(11)
    seen = (distance >= 0) & (distance <= 3)
    want = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=seen)
    got = fla_functions.flash_attention(call_of(), q, k, v, causal=True, window_size=(3, 0))
    assert relative_error(got, want.transpose(1, 2)) < 1e-12


X = torch.zeros(1, 11, 1, 2)


@pytest.mark.parametrize(
    ("run", "says"),
    [
        (lambda call: fla_functions.gla(call, X, X, X, X, initial_state=X), "with a state.*use_cache"),
        (lambda call: fla_functions.kda(call, X, X, X, X, X[..., 0], output_final_state=True), "kda.*with a state"),
        (lambda call: fla_functions.gla(call, X, X, X, gk=X, gv=X), "with gv"),
        (lambda call: fla_functions.simple_gla(call, X, X, X, g_gamma=X), "with g_gamma"),
        (lambda call: fla_functions.convolution(call, X[..., 0], X[0, :1, 0], residual=X[..., 0]), "with residual"),
        (lambda call: fla_functions.flash_attention(call, X, X, X, dropout_p=0.1), "dropout 0.1"),
        (lambda call: rotary_of_positions(rotary(False, scale=X), X, X), "scale_base"),
    ],
)
def test_what_is_not_supported_is_refused(run: Callable[[ParallelCall], Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        run(call_of())


# ------------------------------------------------------------------------------------------------- the table


def fake(module: str, name: str, **children: nn.Module) -> nn.Module:
    made: nn.Module = type(name, (nn.Module,), {"__module__": module})()
    for child, value in children.items():
        made.add_module(child, value)
    return made


def test_layers_are_known_by_file_and_class() -> None:
    convolution = fake("fla.modules.causal_conv1d.ops", "ShortConvolution")
    plain = fake("fla.layers.gla", "GatedLinearAttention")
    with_convolution = fake("fla.layers.gla", "GatedLinearAttention", q_conv1d=convolution)
    found = mixers.mixers_of(fake("fla.models.gla.modeling_gla", "GLAModel", first=plain, second=with_convolution))
    assert found[plain].calls == (mixers.GLA,)
    assert found[with_convolution].calls == (mixers.GLA, mixers.CONVOLUTION)
    assert convolution not in found
    # A class of the same name in another package is none of them.
    assert mixers.class_in_table(fake("others", "GatedLinearAttention")) is None


def test_other_layers_and_models_of_the_package_are_refused_by_name() -> None:
    known = fake("fla.layers.gla", "GatedLinearAttention")
    unknown = fake("fla.layers.nsa", "NativeSparseAttention")
    with pytest.raises(InputError, match=r"the layer 'second' of GLAModel, a NativeSparseAttention"):
        mixers.mixers_of(fake("fla.models.gla.modeling_gla", "GLAModel", first=known, second=unknown))
    with pytest.raises(InputError, match=r"CATModel of flash-linear-attention.*gated_deltanet.*register_adapter"):
        mixers.mixers_of(fake("fla.models.cat.modeling_cat", "CATModel", first=known))
