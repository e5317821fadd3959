"""Small random models of each family of Transformers: layers of each type, odd sizes, grouped heads, mixtures of experts."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import nn

VOCABULARY = 61


@dataclass(frozen=True)
class Family:
    """One kind of model: names of its classes in a package, Transformers or ``fla.models``, and the config's options."""

    model: str
    config: str
    options: dict[str, Any] = field(default_factory=dict)
    package: str = "transformers"


_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
_BODY = {"hidden_size": 24, "intermediate_size": 40}
_MIXED = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
_DELTA = {
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_LATENT = {"kv_lora_rank": 10, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 7}
_EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 14}
_SHARED_EXPERTS = {**_EXPERTS, "shared_expert_intermediate_size": 10}
_MAMBA2 = {"mamba_n_heads": 6, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 10, "mamba_chunk_size": 16}
_QWEN35 = {
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "head_dim": 16,
    "layer_types": _MIXED,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.5,
        "mrope_section": [2, 1, 1],
    },
    **_HEADS,
    **_DELTA,
}
_CONVOLUTIONS = {
    **_BODY,
    **_HEADS,
    "num_hidden_layers": 4,
    "layer_types": ["conv", "full_attention", "conv", "full_attention"],
}

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", "LlamaConfig", {**_BODY, **_HEADS, "num_hidden_layers": 2}),
    "mistral": Family(
        "MistralForCausalLM", "MistralConfig", {**_BODY, **_HEADS, "num_hidden_layers": 2, "sliding_window": 9}
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        "Qwen3Config",
        {
            **_BODY,
            **_HEADS,
            "num_hidden_layers": 4,
            "head_dim": 6,
            "use_sliding_window": True,
            "sliding_window": 9,
            "max_window_layers": 2,
        },
    ),
    "gemma3": Family(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {
            **_BODY,
            **_HEADS,
            "num_hidden_layers": 4,
            "head_dim": 6,
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {**_BODY, **_HEADS, "num_hidden_layers": 2, "head_dim": 6, "sliding_window": 9, "attn_logit_softcapping": 1.5},
    ),
    "gpt_oss": Family(
        "GptOssForCausalLM",
        "GptOssConfig",
        {
            **_BODY,
            **_HEADS,
            "num_hidden_layers": 2,
            "head_dim": 6,
            "num_local_experts": 3,
            "num_experts_per_tok": 2,
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "llama4": Family(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {
            **_BODY,
            **_HEADS,
            "num_hidden_layers": 4,
            "head_dim": 6,
            "attention_chunk_size": 8,
            "floor_scale": 4,
            "attn_scale": 0.7,
            "num_local_experts": 2,
            "intermediate_size_mlp": 40,
            "no_rope_layers": [1, 0, 1, 0],
            "layer_types": ["chunked_attention", "full_attention"] * 2,
        },
    ),
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            **_BODY,
            **_LATENT,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "q_lora_rank": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 14,
            "first_k_dense_replace": 1,
        },
    ),
    "lfm2": Family("Lfm2ForCausalLM", "Lfm2Config", {**_CONVOLUTIONS, "block_auto_adjust_ff_dim": False}),
    "lfm2_moe": Family(
        "Lfm2MoeForCausalLM",
        "Lfm2MoeConfig",
        {
            **_CONVOLUTIONS,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 14,
            "num_dense_layers": 1,
        },
    ),
    "lfm3": Family("Lfm3ForCausalLM", "Lfm3Config", _CONVOLUTIONS),
    "minimax": Family(
        "MiniMaxForCausalLM",
        "MiniMaxConfig",
        {
            "hidden_size": 24,
            "intermediate_size": 14,
            **_HEADS,
            "num_hidden_layers": 4,
            "head_dim": 6,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "block_size": 16,
            "layer_types": _MIXED,
            "full_attn_alpha_factor": 0.9,
            "linear_attn_beta_factor": 1.1,
        },
    ),
    "qwen3_next": Family(
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        {
            **_BODY,
            **_HEADS,
            **_DELTA,
            **_SHARED_EXPERTS,
            "num_hidden_layers": 4,
            "head_dim": 12,
            "linear_conv_kernel_dim": 4,
            "mlp_only_layers": [1],
            "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
        },
    ),
    "qwen3_5": Family("Qwen3_5ForCausalLM", "Qwen3_5TextConfig", {**_QWEN35, "intermediate_size": 40}),
    "qwen3_5_moe": Family("Qwen3_5MoeForCausalLM", "Qwen3_5MoeTextConfig", {**_QWEN35, **_SHARED_EXPERTS}),
    "olmo_hybrid": Family(
        "OlmoHybridForCausalLM",
        "OlmoHybridConfig",
        {
            **_BODY,
            **_HEADS,
            "num_hidden_layers": 4,
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 6,
            "linear_value_head_dim": 12,
            "layer_types": _MIXED,
        },
    ),
    "kimi_linear": Family(
        "KimiLinearForCausalLM",
        "KimiLinearConfig",
        {
            **_BODY,
            **_LATENT,
            "moe_intermediate_size": 14,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "linear_head_dim": 6,
            "linear_num_heads": 3,
            "layer_types": _MIXED,
        },
    ),
    "bailing_hybrid": Family(
        "BailingHybridForCausalLM",
        "BailingHybridConfig",
        {
            **_BODY,
            **_LATENT,
            "moe_intermediate_size": 14,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "head_dim": 6,
            "layer_group_size": 2,
            "first_k_dense_replace": 1,
            "num_mtp_layers": 0,
        },
    ),
    "bamba": Family(
        "BambaForCausalLM",
        "BambaConfig",
        {
            **_BODY,
            **_HEADS,
            **_MAMBA2,
            "num_hidden_layers": 4,
            "attn_layer_indices": [1, 3],
            "mamba_expand": 2,
            "time_step_limit": (0.05, 0.9),
        },
    ),
    "granitemoehybrid": Family(
        "GraniteMoeHybridForCausalLM",
        "GraniteMoeHybridConfig",
        {
            "hidden_size": 24,
            "intermediate_size": 16,
            **_HEADS,
            **_MAMBA2,
            "num_hidden_layers": 4,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 12,
            "layer_types": _MIXED,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.7,
            "attention_multiplier": 0.3,
            "logits_scaling": 1.7,
            "position_embedding_type": "rope",
        },
    ),
    "nemotron_h": Family(
        "NemotronHForCausalLM",
        "NemotronHConfig",
        {
            **_BODY,
            **_HEADS,
            "head_dim": 6,
            "layers_block_type": ["mamba", "moe", "attention", "mlp", "mamba", "attention"],
            "mamba_num_heads": 6,
            "mamba_head_dim": 8,
            "n_groups": 2,
            "ssm_state_size": 10,
            "chunk_size": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 14,
            "moe_shared_expert_intermediate_size": 14,
        },
    ),
    "falcon_h1": Family(
        "FalconH1ForCausalLM",
        "FalconH1Config",
        {
            **_BODY,
            **_HEADS,
            **_MAMBA2,
            "num_hidden_layers": 3,
            "head_dim": 6,
            "mamba_d_ssm": 48,
            "mamba_rms_norm": True,
            "mamba_norm_before_gate": False,
            "key_multiplier": 0.7,
            "ssm_multipliers": [0.9, 0.8, 1.1, 1.2, 0.7],
            "lm_head_multiplier": 0.5,
            "ssm_in_multiplier": 1.3,
        },
    ),
    "zamba2": Family(
        "Zamba2ForCausalLM",
        "Zamba2Config",
        {
            "pad_token_id": 0,
            **_BODY,
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "mamba_d_state": 10,
            "mamba_ngroups": 2,
            "n_mamba_heads": 6,
            "mamba_expand": 2,
            "chunk_size": 16,
            "num_attention_heads": 4,
            "num_mem_blocks": 1,
            "use_shared_attention_adapter": True,
            "adapter_rank": 4,
            "use_mem_rope": True,
        },
    ),
    "mamba2": Family(
        "Mamba2ForCausalLM",
        "Mamba2Config",
        {
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "num_heads": 6,
            "head_dim": 8,
            "state_size": 10,
            "n_groups": 2,
            "chunk_size": 16,
        },
    ),
    "jamba": Family(
        "JambaForCausalLM",
        "JambaConfig",
        {
            **_BODY,
            **_HEADS,
            "num_hidden_layers": 4,
            "num_experts": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 5,
            "mamba_dt_rank": 3,
            "mamba_expand": 2,
        },
    ),
    "mamba": Family(
        "MambaForCausalLM",
        "MambaConfig",
        {"hidden_size": 24, "state_size": 5, "num_hidden_layers": 2, "time_step_rank": 3},
    ),
    "falcon_mamba": Family(
        "FalconMambaForCausalLM",
        "FalconMambaConfig",
        {"hidden_size": 24, "state_size": 5, "num_hidden_layers": 2, "time_step_rank": 3},
    ),
    "recurrent_gemma": Family(
        "RecurrentGemmaForCausalLM",
        "RecurrentGemmaConfig",
        {
            **_BODY,
            **_HEADS,
            "num_hidden_layers": 3,
            "lru_width": 24,
            "attention_window_size": 9,
            "conv1d_width": 4,
            "block_types": ["recurrent", "recurrent", "attention"],
            "head_dim": 6,
        },
    ),
    "rwkv": Family(
        "RwkvForCausalLM",
        "RwkvConfig",
        {
            "hidden_size": 24,
            "attention_hidden_size": 24,
            "num_hidden_layers": 2,
            "intermediate_size": 40,
            "rescale_every": 0,
        },
    ),
}

WITH_WINDOWS_OF_MASKS: dict[str, Family] = {
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {
            **_BODY,
            **_HEADS,
            **_SHARED_EXPERTS,
            "num_hidden_layers": 2,
            "use_sliding_window": True,
            "sliding_window": 9,
            "max_window_layers": 2,
        },
    ),
    "phimoe": Family(
        "PhimoeForCausalLM",
        "PhimoeConfig",
        {
            **_BODY,
            **_HEADS,
            "num_hidden_layers": 2,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 9,
        },
    ),
}
"""Models whose windows are in their masks alone."""

WITHOUT_KEYWORDS: dict[str, Family] = {
    "nemotron": Family("NemotronForCausalLM", "NemotronConfig", {**_BODY, **_HEADS, "num_hidden_layers": 2}),
    "stablelm": Family("StableLmForCausalLM", "StableLmConfig", {**_BODY, **_HEADS, "num_hidden_layers": 2}),
}
"""Models whose decoder layers hand no keyword arguments on to their attention."""

_OF_FLA: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "fuse_norm": False,
    "fuse_swiglu": False,
    "fuse_cross_entropy": False,
}
_ATTENTION_OF_FLA = {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "window_size": 9}


def _of_fla(name: str, **options: Any) -> Family:
    return Family(f"{name}ForCausalLM", f"{name}Config", {**_OF_FLA, **options}, "fla.models")


FLA_FAMILIES: dict[str, Family] = {
    "fla_gla": _of_fla(
        "GLA", num_heads=4, num_kv_heads=2, expand_k=0.5, expand_v=1.0, use_short_conv=True, fuse_norm=True
    ),
    "fla_simple_gla": Family(
        "SimpleGLAForCausalLM",
        "SimpleGLAConfig",
        {**_OF_FLA, "num_heads": 4},
        "tests.integrations.transformers.fla_models",
    ),
    "fla_retnet": _of_fla("RetNet", num_heads=2, expand_k=1.0, expand_v=2.0, attn=_ATTENTION_OF_FLA),
    "fla_linear_attn": _of_fla(
        "LinearAttention", num_heads=4, num_kv_heads=2, expand_v=2.0, feature_map="elu", norm_feature_map=True
    ),
    "fla_delta_net": _of_fla("DeltaNet", num_heads=4, expand_v=2.0, use_gate=True, allow_neg_eigval=True),
    "fla_gated_deltanet": _of_fla(
        "GatedDeltaNet",
        num_heads=2,
        num_v_heads=4,
        head_dim=6,
        expand_v=2.0,
        num_hidden_layers=3,
        attn={**_ATTENTION_OF_FLA, "window_size": None},
    ),
    "fla_kda": _of_fla(
        "KDA",
        num_heads=2,
        num_v_heads=4,
        head_dim=6,
        expand_v=2.0,
        allow_neg_eigval=True,
        safe_gate=True,
        lower_bound=-3.0,
        tie_word_embeddings=True,
    ),
    "fla_hgrn": _of_fla("HGRN", use_short_conv=True),
    "fla_hgrn2": _of_fla("HGRN2", num_heads=4, expand_ratio=None, num_hidden_layers=3),
    "fla_mamba2": Family(
        "Mamba2ForCausalLM",
        "Mamba2Config",
        {
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "head_dim": 8,
            "state_size": 10,
            "chunk_size": 16,
            "dt_limit": (0.05, 0.9),
            "D_has_hdim": True,
            "residual_in_fp32": False,
            "fuse_norm": False,
            "fuse_cross_entropy": False,
        },
        "fla.models",
    ),
    "fla_mamba": Family(
        "MambaForCausalLM",
        "MambaConfig",
        {
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "state_size": 5,
            "dt_rank": 3,
            "fuse_norm": False,
            "fuse_cross_entropy": False,
        },
        "fla.models",
    ),
    "fla_samba": _of_fla("Samba", state_size=5, time_step_rank=3, attn=_ATTENTION_OF_FLA),
    "fla_mla": _of_fla(
        "MLA",
        num_heads=4,
        q_lora_rank=8,
        kv_lora_rank=10,
        qk_rope_head_dim=4,
        qk_nope_head_dim=6,
        qk_head_dim=10,
        v_head_dim=7,
        window_size=9,
    ),
    "fla_rwkv6": Family(
        "RWKV6ForCausalLM",
        "RWKV6Config",
        {
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_heads": 2,
            "proj_low_rank_dim": 3,
            "gate_low_rank_dim": 5,
            "fuse_norm": False,
            "fuse_cross_entropy": False,
        },
        "fla.models",
    ),
    "fla_transformer": _of_fla("Transformer", num_heads=4, num_kv_heads=2, window_size=9, qk_norm=True),
}
"""Those of flash-linear-attention, whose layers run on a CPU inside of `fla_on_cpu`."""


def build(name: str, **options: Any) -> nn.Module:
    """A float64 model of a family with random weights, in evaluation mode; `options` replace those of its config."""
    family = (FAMILIES | WITH_WINDOWS_OF_MASKS | WITHOUT_KEYWORDS | FLA_FAMILIES)[name]
    package = import_module(family.package)
    given = {"pad_token_id": None, **family.options, **options}
    config = getattr(package, family.config)(vocab_size=VOCABULARY, bos_token_id=None, eos_token_id=None, **given)
    # Products grouped by expert have no float64.
    config._experts_implementation = "eager"
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        return randomised(getattr(package, family.model)(config)).double().eval()
    finally:
        torch.set_default_dtype(before)


def named_as_of_fla(model: Any) -> None:
    """Let attention layers pass for layers of flash-linear-attention, of which they have the names alone."""
    for layer in model.model.layers:
        kind = type(layer.self_attn)
        layer.self_attn.__class__ = type("GatedLinearAttention", (kind,), {"__module__": "fla.layers.gla"})


@torch.no_grad()
def randomised(model: nn.Module) -> nn.Module:
    """Every parameter matters: decays of all sizes, norms away from 1, biases away from 0."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
        if name.endswith("A_log"):
            parameter.copy_(noise * 0.7 - 0.5)
        elif name.endswith("dt_bias"):
            parameter.copy_(noise * 0.5 - 1.0)
        elif "conv" in name:
            parameter.copy_(noise * 0.4)
        elif parameter.dim() >= 2:
            parameter.copy_(noise / parameter.shape[-1] ** 0.5)
        else:
            parameter.add_(noise * 0.2)
    return model
