"""Small random Llamas of Transformers, for what is converted from them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

VALUES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "rope_parameters": {"rope_type": "default", "rope_theta": 12_345.0},
    "rms_norm_eps": 3e-6,
    "max_position_embeddings": 128,
    "eos_token_id": 0,
}


LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 12_345.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
"""The scaling of Llama 3.1 on fewer tokens: of eight pairs of channels two are left, two go between, and four turn slower."""


def random_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A float32 model whose weights are large enough for every layer to matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**{**VALUES, **changes}))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    return model.eval()


def saved(model: LlamaForCausalLM, folder: Path, max_shard_size: str = "5GB") -> Path:
    """The folder, written by Transformers."""
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def exact_frequencies(config: LlamaConfig) -> Tensor:
    """What Transformers computes in float32, in float64 and pair by pair, ``[head_dim / 2]``."""
    rope, size = config.rope_parameters, config.head_dim
    plain: list[float] = [rope["rope_theta"] ** -(channel / size) for channel in range(0, size, 2)]
    if rope["rope_type"] != "llama3":
        return torch.tensor(plain, dtype=torch.float64)
    low, high, length = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    found = []
    for frequency in plain:
        wavelength = 2 * math.pi / frequency
        slower = frequency / rope["factor"]
        if wavelength < length / high:
            found.append(frequency)
        elif wavelength > length / low:
            found.append(slower)
        else:
            share = (length / wavelength - low) / (high - low)
            found.append((1 - share) * slower + share * frequency)
    return torch.tensor(found, dtype=torch.float64)


@torch.no_grad()
def exact_logits(model: LlamaForCausalLM, tokens: Tensor) -> Tensor:
    """Logits in float64, in which Transformers' norms and angles are float32: those two computed anew here."""
    frequencies = exact_frequencies(model.config)

    def norm(self: Any, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    def angles(self: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        turned = torch.cat([position_ids.double().unsqueeze(-1) * frequencies] * 2, dim=-1)
        return turned.cos(), turned.sin()

    before = modeling_llama.LlamaRMSNorm.forward, modeling_llama.LlamaRotaryEmbedding.forward
    modeling_llama.LlamaRMSNorm.forward = norm
    modeling_llama.LlamaRotaryEmbedding.forward = angles
    try:
        logits: Tensor = model.double()(tokens).logits
    finally:
        modeling_llama.LlamaRMSNorm.forward, modeling_llama.LlamaRotaryEmbedding.forward = before
        model.float()
    return logits
