"""Every weight starts as docs/models.md says: matrices as Llama's, and what is no projection as the layer's authors have it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from longspan.models import MIXERS, LinearLlama3, LinearLlama3Config

CONFIG = LinearLlama3Config(vocab_size=100, dim=64, num_layers=4, pattern="L", num_heads=4, hidden_dim=96)

RESIDUAL = ("mixer.out_proj.weight", "feed_forward.down_proj.weight")
ONES = ("norm.weight", "features.gamma", "skip.D", "rates.D")
ZEROS = ("decay.bias", "features.beta", "logits", "channels.shift")
ELSEWHERE = {
    # Names of a mixer's weights that another test has the values of.
    "simple_gla": ("decay.A_log", "decay.dt_bias"),
    "mamba": ("convolution.weight", "convolution.bias", "dt_proj.weight", "dt_proj.bias", "rates.A_log"),
    "mamba2": ("convolution.weight", "convolution.bias", "decay.A_log", "decay.dt_bias"),
    "deltanet": ("convolution.weight",),
    "gated_deltanet": ("convolution.weight", "decay.A_log", "decay.dt_bias"),
    "deltaproduct": ("convolution.weight", "decay.A_log", "decay.dt_bias"),
    "kda": ("convolution.weight", "decay.A_log", "decay.dt_bias"),
    "chela": ("convolution.weight", "convolution.log_rates", "convolution.coefficients"),
    "rwkv7": (
        "token_mix.mu",
        *(f"channels.{name}" for name in ("decay", "rate", "removal", "replacement", "bonus", "scale", "value")),
    ),
}


def drawn(name: str, seed: int = 3) -> dict[str, Tensor]:
    """The weights of a model of one mixer, of which none keeps what it was."""
    model = LinearLlama3(dataclasses.replace(CONFIG, pattern=(name,)))
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    model.init_weights(seed)
    return {key: parameter.detach() for key, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", MIXERS)
def test_matrices_are_drawn_as_llamas_and_what_is_no_projection_is_not(name: str) -> None:
    """Those into the residual stream smaller, by the number of layers."""
    matrices = 0
    for key, weight in drawn(name).items():
        assert weight.isfinite().all(), key
        if key.endswith(ELSEWHERE.get(name, ())):
            continue
        if key.endswith(ONES):
            assert bool((weight == 1).all()), key
        elif key.endswith(ZEROS):
            assert not weight.any(), key
        else:
            deviation = 0.02 / math.sqrt(2 * CONFIG.num_layers) if key.endswith(RESIDUAL) else 0.02
            assert weight.dim() == 2 and weight.std() == pytest.approx(deviation, rel=0.2), key
            # Five deviations of a mean of so many numbers.
            assert abs(float(weight.mean())) < 5 * deviation / math.sqrt(weight.numel()), key
            matrices += 1
    # Embedding and head; of each layer the feed-forward's three, and of a mixer's two at least.
    assert matrices >= 2 + CONFIG.num_layers * 5


def test_no_matrix_is_drawn_as_another_one_of_its_size() -> None:
    weights = drawn("linear_attention")
    squares = [weight for key, weight in weights.items() if weight.shape == (64, 64)]
    assert len(squares) == 16
    assert not any(torch.equal(one, other) for i, one in enumerate(squares) for other in squares[:i])


def test_rwkv_7_starts_by_its_layers_depth_and_its_channels_as_its_authors_have_it() -> None:
    """By the loops of their code (BlinkDL/RWKV-LM, RWKV-v7), a channel after another."""
    model: Any = LinearLlama3(dataclasses.replace(CONFIG, pattern=("rwkv7",)))
    size, of_head, layers = CONFIG.dim, CONFIG.size_of_head, CONFIG.num_layers
    for layer, block in enumerate(model.blocks):
        found = {key: parameter.detach().tolist() for key, parameter in block.mixer.named_parameters()}
        for row, power in zip(found["token_mix.mu"], (0.2, 0.9, 0.7, 0.7, 0.9, 0.2), strict=True):
            assert row == pytest.approx(
                [1 - (c / size) ** (power * (1 - layer / layers)) for c in range(size)], abs=1e-6
            )
        wanted: dict[str, list[float]] = {name: [] for name in ("decay", "rate", "removal", "value")}
        for c in range(size):
            linear = c / (size - 1) - 0.5
            zigzag = (c % of_head - (of_head - 1) / 2) / ((of_head - 1) / 2)
            zigzag *= abs(zigzag)
            wanted["decay"].append(
                -6 + 6 * (c / (size - 1)) ** (1 + (layer / (layers - 1)) ** 0.3) + 0.5 + zigzag * 2.5
            )
            wanted["rate"].append(-0.19 + zigzag * 0.3 + linear * 0.4)
            wanted["removal"].append(0.71 - linear * 0.1)
            wanted["value"].append(0.73 - linear * 0.4)
        constants = {"replacement": 1.02, "bonus": -0.04, "scale": ((1 + layer) / layers) ** 0.7, "shift": 0.0}
        wanted |= {name: [value] * size for name, value in constants.items()}
        if layer == 0:
            # It has no earlier layer's values.
            del wanted["value"]
        assert {key for key in found if key.startswith("channels.")} == {f"channels.{name}" for name in wanted}
        for name, values in wanted.items():
            assert found[f"channels.{name}"] == pytest.approx(values, abs=1e-5), (layer, name)
