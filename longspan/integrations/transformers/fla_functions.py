"""What stands in for the functions that layers of flash-linear-attention call: the same arguments, on this rank's tokens.

Shapes: B rows, T tokens of this rank, H heads of v, H_k heads of q and k, K and V their sizes, C channels, W taps. Layers call one
function for training and another for a few tokens, with the same mathematics: one stand-in serves both. Documents are the layout's,
so ``cu_seqlens`` does not reach the layers. No states of a cache come in; what a prompt leaves goes out where one is recorded
(`fla_cache.py`): a state after the prompt's last token, ``[B, H, K, V]`` or, with `state_v_first`, ``[B, H, V, K]``, on every rank;
and of a convolution this rank's last inputs. Names, defaults and conventions are those of release 0.6, which
tests/integrations/transformers/test_fla.py holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import longspan.functional as operators
from longspan.attention.convolution import causal_conv1d
from longspan.attention.shift import token_shift as shifted_by_one
from longspan.attention.softmax import softmax_attention
from longspan.autocast import as_in_product, without_autocast
from longspan.dtypes import at_least_float32
from longspan.errors import InputError
from longspan.integrations.transformers.cache import of_last_token
from longspan.integrations.transformers.call import ParallelCall
from longspan.integrations.transformers.functions import with_state
from longspan.integrations.transformers.mixers import (
    ATTENTION,
    CONVOLUTION,
    DELTA_RULE,
    GATED_DELTA_RULE,
    GLA,
    HGRN,
    KDA,
    LINEAR_ATTENTION,
    RETENTION,
    RWKV6,
    SIMPLE_GLA,
    TOKEN_SHIFT,
)
from longspan.ops.backends import MAX_HEAD_SIZE

EPS_OF_NORMALIZER = 1e-10
"""What `chunk_linear_attn` adds to the sum of its weights."""


def convolution(
    call: ParallelCall,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    activation: str | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """`causal_conv1d`: x ``[B, T, C]``, weight ``[C, W]``, state ``[B, C, W]``."""
    _check_states(call, "causal_conv1d", initial_state, output_final_state)
    _check_left_out("causal_conv1d", residual=residual)
    state = last_inputs(x, weight.shape[1]) if output_final_state else None
    return _convolved(call, x, weight, bias, activation), state


def convolution_of_one_token(
    call: ParallelCall,
    x: Tensor,
    cache: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`causal_conv1d_update`, of a rank with one token, x ``[B, 1, C]``, which is the middle of a sequence all the same.

    cache: zeros ``[B, C, W]`` that the layer makes, and where it leaves the token.
    """
    _check_left_out("causal_conv1d_update", residual=residual)
    assert weight is not None
    cache[..., -1] = x[:, -1]
    return _convolved(call, x, weight, bias, activation), cache


def convolution_of_one_token_in_cuda(
    call: ParallelCall,
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """The same of the package causal-conv1d, x ``[B, C]``."""
    conv_state[..., -1] = x
    return _convolved(call, x.unsqueeze(1), weight, bias, activation).squeeze(1)


def _convolved(call: ParallelCall, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    call.take(CONVOLUTION)
    bias = None if bias is None else bias.to(x.dtype)
    return causal_conv1d(x, weight.to(x.dtype), bias, activation, call.layout)


def last_inputs(x: Tensor, num_taps: int) -> Tensor:
    """The last W of this rank's tokens ``[B, T, C]``, as a convolution keeps them: ``[B, C, W]``, zeros before the first."""
    return F.pad(x.transpose(1, 2), (num_taps - x.shape[1], 0))


def gla(
    call: ParallelCall,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    *,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    state_v_first: bool = False,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """`chunk_gla` (log decays g) and `fused_recurrent_gla` (gk): q, k and decays ``[B, T, H, K]``, v ``[B, T, H, V]``."""
    _check_states(call, "gla", initial_state, output_final_state)
    _check_left_out("fused_recurrent_gla", gv=gv)
    call.take(GLA)
    decays = g if gk is None else gk
    assert decays is not None
    out = operators.gla(q, k, v, decays, scale=scale, **_options(call, output_final_state))
    return _with_state_of_kernel(out, state_v_first)


def simple_gla(
    call: ParallelCall,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    *,
    state_v_first: bool = False,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """`chunk_simple_gla` and `fused_recurrent_simple_gla`: a log decay for each head and token, ``[B, T, H]``."""
    _check_states(call, "simple_gla", initial_state, output_final_state)
    _check_left_out("simple_gla", g_gamma=g_gamma)
    call.take(SIMPLE_GLA)
    assert g is not None
    out = operators.simple_gla(q, k, v, g, scale=scale, **_options(call, output_final_state))
    return _with_state_of_kernel(out, state_v_first)


def retention(
    call: ParallelCall,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    *,
    state_v_first: bool = False,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """`chunk_retention` and its like: the decay of head h is 1 - 2^(-5 - h)."""
    _check_states(call, "retention", initial_state, output_final_state)
    call.take(RETENTION)
    # On the CPU, so that choosing an exchange does not wait for the device; in the steps of the original.
    decays = (1 - 2.0 ** (-5.0 - torch.arange(v.shape[2], dtype=torch.float))).log()
    out = operators.retention(q, k, v, decays, scale=scale, **_options(call, output_final_state))
    return _with_state_of_kernel(out, state_v_first)


def parallel_retention(
    call: ParallelCall,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    output_attentions: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The same; what the original returns second is weights of all tokens, and None without them.

    Here it is the state of a prompt that is recorded: layers of ranks with few tokens call a function that returns it.
    """
    return retention(call, q, k, v, scale, output_final_state=call.recorder is not None)


def linear_attention(
    call: ParallelCall,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Any = None,
    output_final_state: bool = False,
    normalize: bool = True,
    **_: Any,
) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor] | None]:
    """`chunk_linear_attn` and its like; with `normalize`, divided by the sum of its weights.

    Its state then is a pair: that of the values, and the sum of the keys ``[B, 1, H, K]`` in their dtype.
    """
    _check_states(call, "linear_attn", initial_state, output_final_state)
    call.take(LINEAR_ATTENTION)
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    options = _options(call, output_final_state)
    if not normalize:
        return with_state(operators.linear_attention(q, k, v, scale=scale, **options))
    # The scale is in the numerator and in the denominator, but not in what is added to that.
    out = operators.normalized_linear_attention(q, k, v, eps=EPS_OF_NORMALIZER / scale, **options)
    o, state = with_state(out)
    if state is None:
        return o, None
    return o, (state[..., :-1], state[..., -1].unsqueeze(1).to(k.dtype))


def delta_rule(
    call: ParallelCall,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """`chunk_delta_rule` and `fused_recurrent_delta_rule`: q, k ``[B, T, H, K]``, v ``[B, T, H, V]``, beta ``[B, T, H]``."""
    _check_states(call, "delta_rule", initial_state, output_final_state)
    call.take(DELTA_RULE)
    options = _options(call, output_final_state) | {"backend": _own_kernels(q), "qk_l2norm": use_qk_l2norm_in_kernel}
    return with_state(operators.delta_rule(q, k, v, beta, scale=scale, **options))


def gated_delta_rule(call: ParallelCall, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """`chunk_gated_delta_rule` and its like: q, k ``[B, T, H_k, K]``, v ``[B, T, H, V]``, g and beta ``[B, T, H]``."""
    call.take(GATED_DELTA_RULE)
    return _gated_delta_rule(call, operators.gated_delta_rule, *args, **kwargs)


def kda(call: ParallelCall, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """`chunk_kda` and `fused_recurrent_kda`: as the gated delta rule, g ``[B, T, H, K]``."""
    call.take(KDA)
    return _gated_delta_rule(call, operators.kda, *args, **kwargs)


def _gated_delta_rule(
    call: ParallelCall,
    operator: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    *,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    lower_bound: float | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    state_v_first: bool = False,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    name = operator.__name__
    _check_states(call, name, initial_state, output_final_state)
    _check_left_out(name, gk=gk, gv=gv)
    decays = _log_decays(g, A_log, dt_bias, lower_bound) if use_gate_in_kernel else g
    if use_beta_sigmoid_in_kernel:
        beta = torch.sigmoid(at_least_float32(beta))
        if allow_neg_eigval:
            beta = 2.0 * beta
    options = _options(call, output_final_state) | {"backend": _own_kernels(q), "qk_l2norm": use_qk_l2norm_in_kernel}
    return _with_state_of_kernel(operator(q, k, v, decays, beta, scale=scale, **options), state_v_first)


def _own_kernels(q: Tensor) -> str | None:
    """The backend of a delta rule: the package's own kernels where they take q, with longspan's exchange around them."""
    halves = (torch.bfloat16, torch.float16)
    takes = as_in_product(q).dtype in halves and q.shape[3] <= MAX_HEAD_SIZE
    return "fla" if takes and q.device.type == "cuda" and torch.version.hip is None else None


def _log_decays(g: Tensor, rate: Tensor | None, bias: Tensor | None, lower_bound: float | None) -> Tensor:
    """Log decays from what a layer's projection gives, ``[B, T, H]`` or ``[B, T, H, K]``: the gate inside of the kernels.

    ``-e^rate · softplus(g + bias)``, or between `lower_bound` and 0, ``lower_bound · sigmoid(e^rate · (g + bias))``; rate ``[H]``,
    bias ``[H]`` or ``[H · K]``.
    """
    g = at_least_float32(g)
    if bias is not None:
        g = g + bias.to(g.dtype).view(g.shape[2:])
    factor = None if rate is None else rate.to(g.dtype).exp().view(-1, *(1,) * (g.dim() - 3))
    if lower_bound is not None:
        return lower_bound * torch.sigmoid(g if factor is None else factor * g)
    assert factor is not None
    return -factor * F.softplus(g)


def hgrn(
    call: ParallelCall,
    x: Tensor,
    g: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """`chunk_hgrn` and `fused_recurrent_hgrn`, ``h_t = e^{g_t} h_{t-1} + x_t``: x and g ``[B, T, C]``, h ``[B, C]``.

    A head a channel.
    """
    _check_states(call, "hgrn", initial_state, output_final_state)
    call.take(HGRN)
    ones = x.new_ones(*x.shape[:2], 1, 1)
    # There is no matrix product in the recurrence for autocast to round.
    with without_autocast(x):
        out = operators.simple_gla(ones, ones, x.unsqueeze(-1), g, scale=1.0, **_options(call, output_final_state))
    o, state = with_state(out)
    return o.squeeze(-1), None if state is None else state.flatten(1)


def rwkv6(
    call: ParallelCall,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """`chunk_rwkv6` and `fused_recurrent_rwkv6`: r, k and log decays w ``[B, T, H, K]``, v ``[B, T, H, V]``, u ``[H, K]``.

    ``o_t = scale · (S_{t-1} + (u ⊙ k_t) v_tᵀ)ᵀ r_t`` with ``S_t = diag(e^{w_t}) S_{t-1} + k_t v_tᵀ``: gated linear attention whose
    keys, values and decays are those of the token before, and the token's own part.
    """
    _check_states(call, "rwkv6", initial_state, output_final_state)
    call.take(RWKV6)
    r, k, v = as_in_product(r), as_in_product(k), as_in_product(v)
    scale = r.shape[3] ** -0.5 if scale is None else scale
    sizes = [k.shape[3], v.shape[3]]
    pairs = shifted_by_one(torch.cat([k, v], dim=3).flatten(2), layout=call.layout).unflatten(2, (r.shape[2], -1))
    decays = shifted_by_one(w.flatten(2), layout=call.layout).view_as(w)
    keys, values = pairs.split(sizes, dim=3)
    before, state = with_state(
        operators.gla(r, keys, values, decays, scale=scale, **_options(call, output_final_state))
    )
    with without_autocast(r):
        wide = at_least_float32(r)
        own = (wide * u.to(wide.dtype) * k).sum(3, keepdim=True) * (scale * v)
        if state is not None:
            # Shifted keys and values end before the prompt's last token.
            k, v, w = (of_last_token(at_least_float32(x[:, -1]), call.layout) for x in (k, v, w))
            state = w.exp().unsqueeze(3) * state + k.unsqueeze(3) * v.unsqueeze(2)
    return before + own.to(before.dtype), state


def token_shift(
    call: ParallelCall,
    x: Tensor,
    cu_seqlens: Tensor | None = None,
    cache: Tensor | None = None,
    output_cache: bool = False,
    chunk_indices: Tensor | None = None,
) -> Tensor:
    """The token before each less the token itself, ``[B, T, C]``; zero before a document's first."""
    _check_no_state("token_shift", cache is not None or output_cache)
    call.take(TOKEN_SHIFT)
    return shifted_by_one(x, layout=call.layout) - x


def flash_attention(
    call: ParallelCall,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    **_: Any,
) -> Tensor:
    """flash-attn's `flash_attn_func`: q ``[B, T, H, K]``, k and v ``[B, T, H_k, K]``; a window of keys before the query's own."""
    if dropout_p:
        raise InputError(f"attention dropout {dropout_p} is not supported over ranks. Set it to 0")
    call.take(ATTENTION)
    return softmax_attention(
        q,
        k,
        v,
        causal=causal,
        window=None if window_size[0] < 0 else window_size[0] + 1,
        scale=softmax_scale,
        layout=call.layout,
        method=call.options.softmax_method,
    )


def _options(call: ParallelCall, output_final_state: bool | None) -> dict[str, Any]:
    """What every operator of linear attention is told."""
    return {
        "output_final_state": bool(output_final_state),
        "layout": call.layout,
        "exchange": call.options.exchange,
    }


def _with_state_of_kernel(out: Tensor | tuple[Tensor, Tensor], v_first: bool) -> tuple[Tensor, Tensor | None]:
    """What an operator returned, and its state laid out as the kernel would."""
    o, state = with_state(out)
    return o, state.mT if state is not None and v_first else state


def _check_states(call: ParallelCall, name: str, initial_state: object, output_final_state: bool | None) -> None:
    """Refuse a state that comes in, or that is asked for where no prompt is recorded."""
    _check_no_state(name, initial_state is not None or (bool(output_final_state) and call.recorder is None))


def _check_no_state(name: str, is_given: bool) -> None:
    if is_given:
        raise InputError(
            f"{name} of flash-linear-attention was called with a state, which would be of a cache: a parallelized model has none. "
            "Leave use_cache and past_key_values out, or decode with longspan.unparallelize(model)"
        )


def _check_left_out(name: str, **given: Tensor | None) -> None:
    for argument, value in given.items():
        if value is not None:
            raise InputError(
                f"{name} of flash-linear-attention is not supported over ranks with {argument}. Leave it out"
            )


FLA_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "causal_conv1d": convolution,
    "causal_conv1d_update": convolution_of_one_token,
    "causal_conv1d_update_cuda": convolution_of_one_token_in_cuda,
    "chunk_delta_rule": delta_rule,
    "chunk_gated_delta_rule": gated_delta_rule,
    "chunk_gla": gla,
    "chunk_hgrn": hgrn,
    "chunk_kda": kda,
    "chunk_linear_attn": linear_attention,
    "chunk_retention": retention,
    "chunk_rwkv6": rwkv6,
    "chunk_simple_gla": simple_gla,
    "flash_attn_func": flash_attention,
    "fused_chunk_linear_attn": linear_attention,
    "fused_chunk_retention": retention,
    "fused_recurrent_delta_rule": delta_rule,
    "fused_recurrent_gated_delta_rule": gated_delta_rule,
    "fused_recurrent_gla": gla,
    "fused_recurrent_hgrn": hgrn,
    "fused_recurrent_kda": kda,
    "fused_recurrent_linear_attn": linear_attention,
    "fused_recurrent_retention": retention,
    "fused_recurrent_rwkv6": rwkv6,
    "fused_recurrent_simple_gla": simple_gla,
    "parallel_retention": parallel_retention,
    "token_shift": token_shift,
}
"""By the name of a function in the package's files of layers, models and modules, what stands in for it."""
