"""Operations per token are those that PyTorch's counter finds in a forward and a backward: exactly, where it can see them.

The counter sees matrix products. It does not see:

- short convolutions, which are sums of shifted products, counted as six for each tap;
- attention by the CPU's flash operator, which has no formula there: its tokens are counted here, one by one;
- that a chunk form computes scores inside its chunks, which the recurrent form does not: as these grow with the chunk, what is
  left at a chunk of no tokens is the recurrent form. Where decays are learned it has up to 8 % more, which sums their gradients.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from longspan.attention import linear
from longspan.attention.long_convolution.kernels import ExponentialKernel
from longspan.attention.long_convolution.operator import long_conv1d
from longspan.models import MIXERS, LinearLlama3, LinearLlama3Config, flops_per_token
from longspan.models.counts import on_meta
from longspan.models.mixers import chela
from longspan.models.mixers.chela import ShortLongConvolution
from longspan.models.mixers.mixer import operations_of_matrices
from longspan.ops.long_convolution import exponentials
from tests.models.tiny import LINEAR_MIXERS

LENGTH = 64
CONFIG = LinearLlama3Config(vocab_size=40, dim=48, num_layers=2, pattern="L", num_heads=4, head_dim=16, hidden_dim=56)
LEARNED_DECAYS = {"simple_gla", "gla", "hgrn2", "mamba2", "gated_deltanet", "deltaproduct", "kda"}


def config_of(name: str) -> LinearLlama3Config:
    return dataclasses.replace(CONFIG, pattern=(name,))


def product_in_place(out: Any, one: Any, other: Any, **options: Any) -> int:
    """Of `Tensor.baddbmm_`, which the counter does not know, by shapes."""
    return int(2 * one[0] * one[1] * one[2] * other[2])


def counted(model: LinearLlama3, tokens: Tensor) -> float:
    """Operations a token."""
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: product_in_place})
    with counter:
        model(tokens).sum().backward()
    return counter.get_total_flops() / tokens.numel()


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^(deltanet|gla|simple_gla|lightning|retention)$")
@pytest.mark.parametrize("name", MIXERS)
def test_linear_maps_are_counted_exactly(name: str) -> None:
    """Without values the operators are one thing each, inside which the counter does not look."""
    model = on_meta(config_of(name))
    assert counted(model, torch.zeros(1, LENGTH, dtype=torch.int64, device="meta")) == operations_of_matrices(model)


@pytest.mark.slow_rows(r"^(gated_deltanet|deltanet|kda|gla|rebased|simple_gla)$")
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^(deltaproduct|lightning|retention)$")
@pytest.mark.parametrize("name", LINEAR_MIXERS)
def test_states_are_counted_as_the_recurrent_form_has_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = LinearLlama3(config_of(name)), torch.zeros(1, LENGTH, dtype=torch.int64)
    # What exponentials take is counted by itself, below.
    monkeypatch.setattr(chela, "long_conv1d", lambda x, kernel, **options: x * kernel.taps(1).squeeze(1))
    found, write = [], linear.write_linear
    for chunk_size in (4, 8):
        monkeypatch.setattr(linear, "write_linear", partial(write, chunk_size=chunk_size))
        found.append(counted(model, tokens) - operations_of_matrices(model))
    convolutions = sum(6.0 * p.numel() for key, p in model.named_parameters() if key.endswith("convolution.weight"))
    convolutions += sum(12.0 * p.numel() for key, p in model.named_parameters() if key.endswith("coefficients"))
    states = flops_per_token(model.config, LENGTH) - operations_of_matrices(model) - convolutions
    of_recurrence = 2 * found[0] - found[1]
    if name == "rwkv7":
        # Of its two rows a token, the one that takes nothing off is multiplied, too: 28 products of states for 24.
        assert 28 / 24 < of_recurrence / states < 1.08 * 28 / 24
    elif name == "gsa":
        # Backward reads the keys of the slots once more, for the gradient of their gates.
        assert 1 < of_recurrence / states < 1.08 * 13 / 12
    elif name in LEARNED_DECAYS:
        assert 1 < of_recurrence / states < 1.08
    elif name == "mamba":
        # What tokens write is no product of matrices, and backward reads once more, for the gradient of the gate.
        assert of_recurrence == states * (2 + 6 + 2) / 12
    else:
        assert of_recurrence == states


def test_exponentials_are_counted_as_a_token_writes_and_reads_them() -> None:
    """Forward, which backward does once more, beside twice as much for gradients; what chunks take inside is left out."""
    kernel = ExponentialKernel(-torch.ones(5, 16), torch.ones(5, 16))
    counter = FlopCounterMode(display=False)
    with counter:
        long_conv1d(torch.ones(1, LENGTH, 5), kernel)
    inside = 2 * exponentials.MOST_TOKENS * 5
    assert counter.get_total_flops() / LENGTH - inside == ShortLongConvolution(5).flops_per_token / 3 - 2 * 4 * 5


@pytest.mark.parametrize("window", [None, 1, 50, LENGTH, 1000])
def test_softmax_layers_are_counted_with_what_tokens_see(window: int | None) -> None:
    config = dataclasses.replace(config_of("softmax"), window=window)
    counted = flops_per_token(config, LENGTH) - operations_of_matrices(on_meta(config))
    seen = sum(min(token + 1, window or LENGTH) for token in range(LENGTH)) / LENGTH
    channels = config.num_layers * config.num_heads * config.size_of_head
    # The formula takes a token that sees half of itself.
    assert counted / (12 * channels) == pytest.approx(seen, abs=0.5)


def test_a_model_says_of_itself_what_its_config_says() -> None:
    for name in MIXERS:
        model = LinearLlama3(config_of(name))
        assert model.flops_per_token(100) == flops_per_token(model.config, 100)
