"""flash-linear-attention without a GPU: its layers and models as they are, over PyTorch functions in place of its Triton kernels.

Where the package has a reference of a kernel in PyTorch (``fla.ops.*.naive`` and others), that is what runs. Kernels alone are
replaced, in the files of layers, modules and models, and put back afterwards: everything that a layer does around them is its own.
States come in and go out as the kernels take and return them. Padding, which layers take off by packing rows, has no stand-in.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspan.integrations.transformers.mixers import FLA_MIXERS

needs_fla = pytest.mark.skipif(
    find_spec("fla") is None, reason="flash-linear-attention is not installed: make test-fla"
)
ignores_warnings = pytest.mark.filterwarnings("ignore")
"""The package warns where there is no GPU, and where flash-attn, mamba-ssm and causal-conv1d are not installed."""

_PLACES = ("fla.layers.", "fla.modules.", "fla.models.")


@contextmanager
def fla_on_cpu() -> Iterator[None]:
    """The package's kernels by PyTorch functions, for as long as the context lasts."""
    stand_ins = _stand_ins()
    for name in ("models", *(name.rpartition(".")[0] for name in FLA_MIXERS)):
        import_module(f"fla.{name}")
    places = [module for name, module in sys.modules.items() if name.startswith(_PLACES)]
    before = [(vars(place), name, vars(place)[name]) for place in places for name in stand_ins if name in vars(place)]
    activations: dict[str, Any] = import_module("fla.modules.activations").ACT2FN
    before += [(activations, name, activations[name]) for name in ("silu", "sigmoid", "sqrelu", "swish")]
    for names, name, _ in before:
        names[name] = stand_ins[name]
    try:
        yield
    finally:
        for names, name, original in before:
            names[name] = original


def _stand_ins() -> dict[str, Callable[..., Any]]:
    delta = import_module("fla.ops.delta_rule.naive").delta_rule_recurrence
    gated = import_module("fla.ops.gated_delta_rule.naive").naive_recurrent_gated_delta_rule
    kimi = import_module("fla.ops.kda.naive").naive_recurrent_kda
    gated_gate = import_module("fla.ops.gated_delta_rule.gate").naive_gdn_gate
    kimi_gates = import_module("fla.ops.kda.gate")
    recurrent_gla = import_module("fla.ops.gla.naive").naive_recurrent_gla
    linear = import_module("fla.ops.linear_attn.naive").naive_recurrent_linear_attn
    retained = import_module("fla.ops.retention.naive").naive_retention
    simple = import_module("fla.ops.simple_gla.naive").naive_recurrent_simple_gla
    rwkv = import_module("fla.ops.rwkv6.recurrent_naive").naive_recurrent_rwkv6
    shift = import_module("fla.modules.token_shift").token_shift_ref
    group_norm = import_module("fla.modules.norm.layernorm").group_norm_ref
    recurrent_hgrn = import_module("fla.ops.hgrn.naive").naive_recurrent_hgrn
    rms_norm = import_module("fla.modules.norm.layernorm").rms_norm_ref
    gated_norm = import_module("fla.modules.norm.layernorm_gated").rms_norm_ref
    rotated = import_module("fla.modules.rotary.ops").rotary_embedding_ref

    def delta_rule(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        initial_state: Tensor | None,
        output_final_state: bool,
        use_qk_l2norm_in_kernel: bool,
    ) -> tuple[Tensor, Tensor | None]:
        if use_qk_l2norm_in_kernel:
            q, k = _unit(q), _unit(k)
        o, state = delta(*(x.transpose(1, 2) for x in (q, k, v, beta)), initial_state, output_final_state)
        return o.transpose(1, 2), state

    def gated_delta_rule(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        initial_state: Tensor | None,
        output_final_state: bool,
        allow_neg_eigval: bool,
        **gate: Any,
    ) -> tuple[Tensor, Tensor | None]:
        assert gate["use_qk_l2norm_in_kernel"] and gate["use_gate_in_kernel"] and gate["use_beta_sigmoid_in_kernel"]
        shared = v.shape[2] // q.shape[2]
        q, k = (_unit(x).repeat_interleave(shared, dim=2) for x in (q, k))
        decays = gated_gate(g, gate["A_log"], gate["dt_bias"])
        beta = beta.sigmoid() * (2 if allow_neg_eigval else 1)
        o, state = gated(q, k, v, beta, decays, None, initial_state, output_final_state)
        return o.to(v.dtype), state

    def kda(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        initial_state: Tensor | None,
        output_final_state: bool,
        allow_neg_eigval: bool,
        **gate: Any,
    ) -> Any:
        assert gate["use_qk_l2norm_in_kernel"] and gate["use_gate_in_kernel"] and gate["use_beta_sigmoid_in_kernel"]
        if gate["lower_bound"] is None:
            decays = kimi_gates.naive_kda_gate(g, gate["A_log"], gate["dt_bias"])
        else:
            decays = kimi_gates.naive_kda_lowerbound_gate(g, gate["A_log"], gate["dt_bias"], gate["lower_bound"])
        beta = beta.sigmoid() * (2 if allow_neg_eigval else 1)
        return kimi(_unit(q), _unit(k), v, decays, beta, None, initial_state, output_final_state)

    def gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, gk: Tensor | None = None, **states: Any) -> Any:
        return recurrent_gla(q, k, v, g if gk is None else gk, **states)

    def retention(q: Tensor, k: Tensor, v: Tensor, initial_state: Tensor | None = None, **states: Any) -> Any:
        decays = (1 - torch.exp2(-5.0 - torch.arange(q.shape[2], dtype=torch.float))).log()
        o, state = simple(q, k, v, decays.expand(q.shape[:3]), initial_state=initial_state, **states)
        if initial_state is None:
            o = retained(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
        return o, state

    def linear_attention(k: Tensor, **given: Any) -> tuple[Tensor, Any]:
        o, state = linear(k=k, **given)
        return o, (state[0], state[1].to(k.dtype)) if isinstance(state, tuple) else state

    def rwkv6(r: Tensor, k: Tensor, v: Tensor, w: Tensor, **given: Any) -> tuple[Tensor, Tensor | None]:
        o, state = rwkv(*(x.transpose(1, 2) for x in (r, k, v, w)), **given)
        return o.transpose(1, 2), state

    def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, seqlen_offsets: int, **_: Any) -> Any:
        positions = slice(seqlen_offsets, seqlen_offsets + x.shape[1])
        return rotated(x, cos[positions], sin[positions], interleaved)

    def rms_norm_gated(
        x: Tensor, g: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "swish", *, eps: float, **_: Any
    ) -> Tensor:
        gate = torch.sigmoid(g) if activation == "sigmoid" else F.silu(g)
        return rms_norm(x, weight, bias, eps=eps) * gate

    def norm(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None = None,
        eps: float = 1e-5,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Any:
        return rms_norm(x, weight, bias, residual, eps, prenorm)

    def rms_norm_linear(
        x: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        return F.linear(norm(x, norm_weight, norm_bias), weight, bias)

    with_states = {
        "causal_conv1d": _convolution,
        "delta_rule": delta_rule,
        "gated_delta_rule": gated_delta_rule,
        "gla": gla,
        "hgrn": recurrent_hgrn,
        "kda": kda,
        "linear_attn": linear_attention,
        "retention": retention,
        "rwkv6": rwkv6,
        "simple_gla": simple,
    }
    states = {name: _with_states(function) for name, function in with_states.items()}
    kernels = {
        f"{kind}_{name}": states[name]
        for name in states
        for kind in ("chunk", "fused_chunk", "fused_recurrent", "parallel")
    }
    return {
        **kernels,
        "causal_conv1d": states["causal_conv1d"],
        "causal_conv1d_update": _convolution_of_one_token,
        "elu_p1": lambda x: F.elu(x) + 1.0,
        "flash_attn_func": _attention,
        "FusedLinearCrossEntropyLoss": _FusedLoss,
        "fused_attnres": import_module("fla.ops.attnres.naive").naive_attnres,
        "group_norm": lambda residual_in_fp32, **given: group_norm(**given),
        "rms_norm": norm,
        "rms_norm_gated": rms_norm_gated,
        "rms_norm_linear": rms_norm_linear,
        "rmsnorm_fn": gated_norm,
        "rotary_embedding": rotary,
        "sigmoid": torch.sigmoid,
        "silu": F.silu,
        "sqrelu": lambda x: F.relu(x).square(),
        "swiglu": lambda x, y: F.silu(x) * y,
        "swiglu_linear": lambda x, y, weight, bias: F.linear(F.silu(x) * y, weight, bias),
        "swish": F.silu,
        "token_shift": shift,
    }


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def _with_states(function: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel from a reference: states are laid out as it is told."""

    def kernel(
        *,
        initial_state: Any = None,
        output_final_state: bool | None = False,
        cu_seqlens: None = None,
        state_v_first: bool = False,
        **given: Any,
    ) -> tuple[Tensor, Any]:
        assert cu_seqlens is None
        if state_v_first and initial_state is not None:
            initial_state = initial_state.mT
        o, state = function(initial_state=initial_state, output_final_state=bool(output_final_state), **given)
        return o, state.mT.contiguous() if state_v_first and state is not None else state

    return kernel


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    taps = weight.shape[1]
    before = x.new_zeros(x.shape[0], x.shape[2], taps) if initial_state is None else initial_state
    inputs = torch.cat([before, x.transpose(1, 2)], dim=2)
    y = F.conv1d(inputs[..., 1:], weight[:, None], bias, groups=x.shape[2]).transpose(1, 2)
    state = inputs[..., -taps:].contiguous() if output_final_state else None
    return (y if activation is None else F.silu(y)), state


def _convolution_of_one_token(
    x: Tensor, cache: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, residual: None
) -> tuple[Tensor, Tensor]:
    """Rows of one token, ``[B, 1, C]``; the cache is changed in place."""
    y, state = _convolution(x, weight, bias, activation, cache, True)
    assert state is not None
    return y, cache.copy_(state)


def _attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, window_size: tuple[int, int]) -> Tensor:
    """The last query sees the last key."""
    distance = torch.arange(k.shape[1] - q.shape[1], k.shape[1])[:, None] - torch.arange(k.shape[1])
    assert causal
    seen = (distance >= 0) & ((distance <= window_size[0]) | (window_size[0] < 0))
    shared = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(shared, dim=2).transpose(1, 2) for x in (k, v))
    return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=seen).transpose(1, 2)


class _FusedLoss(nn.Module):
    """`FusedLinearCrossEntropyLoss`: logits are never seen outside."""

    ignore_index = -100

    def __init__(self, use_l2warp: bool, reduction: str) -> None:
        super().__init__()
        assert not use_l2warp
        self.reduction = reduction

    def forward(self, x: Tensor, target: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        logits = F.linear(x, weight, bias).flatten(0, 1)
        return F.cross_entropy(logits, target.flatten(), ignore_index=self.ignore_index, reduction=self.reduction)
