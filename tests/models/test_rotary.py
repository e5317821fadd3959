"""The rotary embedding, scaled as in Llama 3.1: Transformers' angles, and one model whole, from a prompt, and token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from longspan.models import generate
from longspan.models.hf import LinearLlamaForCausalLM
from longspan.models.rope_parameters import rope_fields
from longspan.models.rotary import RopeScaling, rotation
from tests.compare import relative_error
from tests.models.llama import LLAMA3, exact_frequencies
from tests.models.tiny import random_tokens, tiny_model

PUBLISHED: dict[str, dict[str, Any]] = {
    "Llama 3.1 8B": {"factor": 8.0, "head_dim": 128},
    "Llama 3.2 1B": {"factor": 32.0, "head_dim": 64},
}
SCALED: dict[str, Any] = {"rope_theta": 100.0, "rope_factor": 8.0, "rope_original_length": 40, "head_dim": 10}


@pytest.mark.parametrize("name", [*PUBLISHED, "of the tests"])
def test_scaled_frequencies_are_those_of_transformers(name: str) -> None:
    """As it has them in float32, and to 1e-14 where its formula is computed in float64."""
    own = dict(PUBLISHED.get(name, {"head_dim": 16}))
    size = own.pop("head_dim")
    published = {"rope_theta": 500_000.0, "original_max_position_embeddings": 8192} if own else {}
    config = LlamaConfig(
        hidden_size=4 * size,
        num_attention_heads=4,
        head_dim=size,
        max_position_embeddings=131_072,
        rope_parameters={**LLAMA3, **published, **own},
    )
    fields = rope_fields({"rope_parameters": config.rope_parameters})
    scaling = RopeScaling(
        fields["rope_factor"],
        fields["rope_low_freq_factor"],
        fields["rope_high_freq_factor"],
        fields["rope_original_length"],
    )
    plain = fields["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    found = scaling.scaled(plain)
    exact = exact_frequencies(config)
    assert ((found - exact).abs() / exact).max() < 1e-14
    theirs = LlamaRotaryEmbedding(config).inv_freq.double()
    assert ((found - theirs).abs() / theirs).max() < 1e-6
    ratios = plain / found
    assert ratios.min() == 1 and abs(float(ratios.max()) - fields["rope_factor"]) < 1e-12
    between = (ratios > 1.001) & (ratios < fields["rope_factor"] - 0.001)
    assert between.any()


def test_without_a_scaling_angles_are_as_before() -> None:
    positions = torch.arange(7)
    cos, sin = rotation(positions, 6, 100.0, torch.float64)
    turned = positions.double()[:, None] * 100.0 ** -(torch.arange(0, 6, 2, dtype=torch.float64) / 6)
    assert torch.equal(cos, turned.cos()) and torch.equal(sin, turned.sin())


def test_a_scaled_model_gives_the_same_whole_and_token_by_token() -> None:
    """Other logits than one that is not scaled; and the same in the classes of Transformers."""
    model = tiny_model(pattern="LN", num_layers=2, **SCALED).eval()
    prompt = random_tokens(1, 50)
    with torch.no_grad():
        plain = tiny_model(pattern="LN", num_layers=2, **{**SCALED, "rope_factor": 1.0, "rope_original_length": 8192})
        assert relative_error(model(prompt), plain(prompt)) > 1e-3
        made = list(generate(model, prompt[0], max_new_tokens=6))
        whole = torch.cat([prompt, torch.tensor([made])], dim=1)
        assert model(whole)[0, 49:-1].argmax(-1).tolist() == made
        theirs = LinearLlamaForCausalLM.of(model).eval()
        assert theirs.config.rope_factor == 8.0
        assert torch.equal(theirs(input_ids=prompt).logits, model(prompt))
        assert theirs.generate(prompt, max_new_tokens=6, do_sample=False)[0].tolist() == whole[0].tolist()
