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
from longspan.integrations.transformers.cache import recording
from longspan.integrations.transformers.call import RUNNING, ParallelCall
from longspan.integrations.transformers.fla_cache import RecordingFlaCache
from longspan.integrations.transformers.fla_methods import rotary_of_positions
from longspan.layout import ORDERS, Order, SequenceLayout
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


# ------------------------------------------------------------------------------------------------- what a prompt leaves


HEADS, KEYS, VALUES, LENGTH = 2, 3, 4, 13
SHAPES = {
    "q": (HEADS, KEYS),
    "k": (HEADS, KEYS),
    "v": (HEADS, VALUES),
    "per head": (HEADS,),
    "per channel": (HEADS, KEYS),
    "beta": (HEADS,),
    "x": (5,),
    "per x": (5,),
}


def inputs_of_prompt(layout: SequenceLayout) -> dict[str, Tensor]:
    """This rank's tokens of what kernels take, log decays negative."""
    whole = {name: random(2, LENGTH, *shape, seed=seed) for seed, (name, shape) in enumerate(SHAPES.items())}
    for name in whole:
        if name.startswith("per "):
            whole[name] = F.logsigmoid(whole[name])
    whole["beta"] = whole["beta"].sigmoid()
    return {name: layout.shard(x) for name, x in whole.items()}


def states_of_prompt(layout: SequenceLayout) -> dict[str, Tensor]:
    """The state that each function returns of a prompt."""
    own = inputs_of_prompt(layout)
    q, k, v, x = (own[name] for name in ("q", "k", "v", "x"))
    call = ParallelCall(layout, ParallelOptions(), recorder=RecordingFlaCache())
    functions = fla_functions.FLA_FUNCTIONS
    per_channel: dict[str, Any] = {"q": q, "k": k, "v": v, "g": own["per channel"]}
    per_head = {**per_channel, "g": own["per head"]}
    rwkv = {"r": q, "k": k, "v": v, "w": own["per channel"], "u": random(HEADS, KEYS, seed=9)}
    found: dict[str, Any] = {
        "gla": functions["chunk_gla"](call, **per_channel, output_final_state=True),
        "gla, v first": functions["chunk_gla"](call, **per_channel, output_final_state=True, state_v_first=True),
        "simple_gla": functions["chunk_simple_gla"](call, **per_head, output_final_state=True, state_v_first=True),
        "retention": functions["chunk_retention"](call, q, k, v, output_final_state=True),
        "parallel retention": functions["parallel_retention"](call, q, k, v),
        "delta_rule": functions["chunk_delta_rule"](call, q, k, v, own["beta"], output_final_state=True),
        "gated_delta_rule": functions["chunk_gated_delta_rule"](
            call, **per_head, beta=own["beta"], output_final_state=True, state_v_first=True
        ),
        "kda": functions["chunk_kda"](call, **per_channel, beta=own["beta"], output_final_state=True),
        "hgrn": functions["chunk_hgrn"](call, x, own["per x"], output_final_state=True),
        "rwkv6": functions["chunk_rwkv6"](call, **rwkv, output_final_state=True),
        "linear_attn": functions["chunk_linear_attn"](call, q, k, v, output_final_state=True, normalize=False),
        "normalized": functions["chunk_linear_attn"](call, q.exp(), k.exp(), v, output_final_state=True),
    }
    states = {name: state for name, (_, state) in found.items()}
    states["normalized"], states["sum of keys"] = states["normalized"]
    return states


def recurrent_states() -> dict[str, Tensor]:
    """The same token by token, in one process."""
    given = inputs_of_prompt(longspan.SequenceLayout.local(LENGTH))
    k, v, beta = (given[name] for name in ("k", "v", "beta"))
    kept = given["per channel"].exp()[..., None]
    kept_of_head = given["per head"].exp()[..., None, None]
    constant = (1 - 2.0 ** (-5.0 - torch.arange(HEADS, dtype=torch.float64)))[:, None, None].expand(2, LENGTH, -1, 1, 1)
    one = torch.ones_like(constant)

    def state(kept: Tensor, delta: bool = False, keys: Tensor = k) -> Tensor:
        memory = torch.zeros(2, HEADS, KEYS, VALUES, dtype=torch.float64)
        for t in range(LENGTH):
            memory = kept[:, t] * memory
            value = v[:, t]
            if delta:
                value = beta[:, t, :, None] * (value - (memory * keys[:, t, :, :, None]).sum(2))
            memory = memory + keys[:, t, :, :, None] * value[:, :, None]
        return memory

    hidden = torch.zeros(2, 5, dtype=torch.float64)
    for t in range(LENGTH):
        hidden = given["per x"][:, t].exp() * hidden + given["x"][:, t]
    return {
        "gla": state(kept),
        "gla, v first": state(kept).mT,
        "simple_gla": state(kept_of_head).mT,
        "retention": state(constant),
        "parallel retention": state(constant),
        "delta_rule": state(one, delta=True),
        "gated_delta_rule": state(kept_of_head, delta=True).mT,
        "kda": state(kept, delta=True),
        "hgrn": hidden,
        "rwkv6": state(kept),
        "linear_attn": state(one),
        "normalized": state(one, keys=k.exp()),
        "sum of keys": k.exp().sum(1, keepdim=True),
    }


def states_over_ranks(order: Order) -> dict[str, Tensor]:
    return states_of_prompt(longspan.SequenceLayout(LENGTH, order=order))


@pytest.mark.parametrize("order", ORDERS)
def test_the_state_after_a_prompt_is_that_of_each_kernel_on_every_rank(order: Order) -> None:
    want = recurrent_states()
    for found in run_on_ranks(2, states_over_ranks, order):
        assert found.keys() == want.keys()
        for name, state in found.items():
            # float32 decays of retention are the package's.
            tolerance = 1e-6 if "retention" in name else 1e-12
            assert relative_error(state, want[name]) < tolerance, name


class Filled:
    """In place of the package's cache: how it is filled."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def update(self, **given: Any) -> None:
        self.calls.append(given)


def memories_of(order: Order, length: int, to: range, window: int | None) -> list[dict[str, Any]] | None:
    """What the cache is filled with by a layer of every kind of memory, where this rank fills one."""
    layout = longspan.SequenceLayout(length, order=order)
    recorder = recording(RecordingFlaCache, Filled(), layout, to)
    recorder.layers_with_memory = frozenset({1})
    keys, x = layout.shard(random(2, length, 3)), layout.shard(random(2, length, 5, seed=1))
    recorder.update(
        recurrent_state=torch.ones(2, 3),
        attn_state=(keys, -keys),
        conv_state=(fla_functions.last_inputs(x, 4), fla_functions.last_inputs(x, 2)),
        layer_idx=1,
        offset=x.shape[1],
        cache_kwargs={"window_size": window},
    )
    recorder.update(ffn_state=x[:, -1], layer_idx=1, offset=0)
    recorder.check()
    cache = recorder.hand_over()
    return None if cache is None else cache.calls


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("length", "window"), [(3, 2), (3, 8), (17, 5), (17, None)])
def test_what_ranks_remember_comes_together(order: Order, length: int, window: int | None) -> None:
    keys, x = random(2, length, 3), random(2, length, 5, seed=1)
    kept = length if window is None else min(length, window)
    inputs = F.pad(x.transpose(1, 2), (4, 0))
    for calls in run_on_ranks(3, memories_of, order, length, range(3), window):
        # Keys count as tokens; those that a window has forgotten are counted before.
        before, filled = calls
        assert before == {"layer_idx": 1, "offset": length - kept}
        assert filled["layer_idx"] == 1 and filled["cache_kwargs"] == {"window_size": window}
        assert torch.equal(filled["recurrent_state"], torch.ones(2, 3))
        for got, want in zip(filled["attn_state"], (keys, -keys), strict=True):
            assert torch.equal(got, want[:, -kept:]) and got.is_contiguous()
        for got, taps in zip(filled["conv_state"], (4, 2), strict=True):
            assert torch.equal(got, inputs[..., -taps:]) and got.is_contiguous()
        assert torch.equal(filled["ffn_state"], x[:, -1])
    assert run_on_ranks(3, memories_of, order, length, range(1, 2), window)[::2] == [None, None]
