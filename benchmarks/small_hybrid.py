"""The hybrid model that several tables train or read prompts with: Qwen3-Next's layers, with plain feed-forward layers."""

from __future__ import annotations

from typing import Any

import torch


def small_hybrid(width: int, *, feed_forward: int, key_heads: int, vocabulary: int) -> Any:
    """Three layers of gated delta rule and one of softmax attention, of random weights that are always the same.

    Four heads of softmax attention of a quarter of the width, and twice as many heads of values as `key_heads`, of the same size.
    """
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    torch.manual_seed(0)
    config = Qwen3NextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=feed_forward,
        num_hidden_layers=4,
        layer_types=["linear_attention", "linear_attention", "linear_attention", "full_attention"],
        mlp_only_layers=[0, 1, 2, 3],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=width // 4,
        linear_num_key_heads=key_heads,
        linear_num_value_heads=2 * key_heads,
        linear_key_head_dim=width // 4,
        linear_value_head_dim=width // 4,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return Qwen3NextForCausalLM(config)
