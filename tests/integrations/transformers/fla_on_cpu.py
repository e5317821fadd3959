"""flash-linear-attention without a GPU: its layers and models as they are, over PyTorch functions in place of its Triton kernels.

Where the package has a reference of a kernel in PyTorch (``fla.ops.*.naive`` and others), that is what runs. Kernels alone are
replaced, in the files of layers, modules and models, and put back afterwards: everything that a layer does around them is its own.
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
        q: Tensor, k: Tensor, v: Tensor, beta: Tensor, use_qk_l2norm_in_kernel: bool, **_: Any
    ) -> tuple[Tensor, None]:
        if use_qk_l2norm_in_kernel:
            q, k = _unit(q), _unit(k)
        o, _state = delta(*(x.transpose(1, 2) for x in (q, k, v, beta)))
        return o.transpose(1, 2), None

    def gated_delta_rule(
        q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, allow_neg_eigval: bool, **gate: Any
    ) -> tuple[Tensor, None]:
        assert gate["use_qk_l2norm_in_kernel"] and gate["use_gate_in_kernel"] and gate["use_beta_sigmoid_in_kernel"]
        shared = v.shape[2] // q.shape[2]
        q, k = (_unit(x).repeat_interleave(shared, dim=2) for x in (q, k))
        decays = gated_gate(g, gate["A_log"], gate["dt_bias"])
        o, state = gated(q, k, v, beta.sigmoid() * (2 if allow_neg_eigval else 1), decays)
        return o.to(v.dtype), state

    def kda(
        q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, allow_neg_eigval: bool, **gate: Any
    ) -> tuple[Tensor, None]:
        assert gate["use_qk_l2norm_in_kernel"] and gate["use_gate_in_kernel"] and gate["use_beta_sigmoid_in_kernel"]
        if gate["lower_bound"] is None:
            decays = kimi_gates.naive_kda_gate(g, gate["A_log"], gate["dt_bias"])
        else:
            decays = kimi_gates.naive_kda_lowerbound_gate(g, gate["A_log"], gate["dt_bias"], gate["lower_bound"])
        return kimi(_unit(q), _unit(k), v, decays, beta.sigmoid() * (2 if allow_neg_eigval else 1))

    def gla(
        q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, gk: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, None]:
        return recurrent_gla(q, k, v, g if gk is None else gk)

    def simple_gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor, **_: Any) -> tuple[Tensor, None]:
        return simple(q, k, v, g)

    def retention(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> tuple[Tensor, None]:
        return retained(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2), None

    def linear_attention(q: Tensor, k: Tensor, v: Tensor, normalize: bool, **_: Any) -> tuple[Tensor, None]:
        return linear(q, k, v, normalize=normalize)

    def rwkv6(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, scale: float, **_: Any) -> tuple[Tensor, None]:
        o, state = rwkv(*(x.transpose(1, 2) for x in (r, k, v, w)), u, scale)
        return o.transpose(1, 2), state

    def hgrn(x: Tensor, g: Tensor, **_: Any) -> tuple[Tensor, None]:
        return recurrent_hgrn(x, g)

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

    return {
        "causal_conv1d": _convolution,
        "chunk_delta_rule": delta_rule,
        "chunk_gated_delta_rule": gated_delta_rule,
        "chunk_gla": gla,
        "chunk_hgrn": hgrn,
        "chunk_kda": kda,
        "chunk_linear_attn": linear_attention,
        "chunk_retention": retention,
        "chunk_rwkv6": rwkv6,
        "chunk_simple_gla": simple_gla,
        "elu_p1": lambda x: F.elu(x) + 1.0,
        "flash_attn_func": _attention,
        "FusedLinearCrossEntropyLoss": _FusedLoss,
        "fused_attnres": import_module("fla.ops.attnres.naive").naive_attnres,
        "fused_chunk_linear_attn": linear_attention,
        "fused_recurrent_delta_rule": delta_rule,
        "fused_recurrent_gated_delta_rule": gated_delta_rule,
        "fused_recurrent_gla": gla,
        "fused_recurrent_hgrn": hgrn,
        "fused_recurrent_kda": kda,
        "fused_recurrent_linear_attn": linear_attention,
        "fused_recurrent_retention": retention,
        "fused_recurrent_rwkv6": rwkv6,
        "fused_recurrent_simple_gla": simple_gla,
        "group_norm": lambda residual_in_fp32, **given: group_norm(**given),
        "parallel_retention": retention,
        "rms_norm": norm,
        "rms_norm_gated": rms_norm_gated,
        "rms_norm_linear": rms_norm_linear,
        "rmsnorm_fn": gated_norm,
        "rotary_embedding": lambda x, cos, sin, interleaved=False, **_: rotated(
            x, cos[: x.shape[1]], sin[: x.shape[1]], interleaved
        ),
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


def _convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **_: Any
) -> tuple[Tensor, None]:
    taps = weight.shape[1]
    y = F.conv1d(F.pad(x.transpose(1, 2), (taps - 1, 0)), weight[:, None], bias, groups=x.shape[2]).transpose(1, 2)
    return (y if activation is None else F.silu(y)), None


def _attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, window_size: tuple[int, int]) -> Tensor:
    tokens = torch.arange(q.shape[1])
    distance = tokens[:, None] - tokens
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
