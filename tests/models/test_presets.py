"""Presets have the shapes of the models they are named after."""

from __future__ import annotations

import pytest

from longspan.errors import ConfigError
from longspan.models import MIXERS, PRESETS, num_parameters, preset
from longspan.train.config import DataConfig, ModelConfig


def test_with_softmax_layers_alone_the_large_ones_are_as_large_as_llama_3() -> None:
    """As Meta's checkpoints: Llama 3 8B, and Llama 3.2 1B, which has twice as many heads, half as large."""
    assert num_parameters(preset("linear-llama3-8b", pattern="N")) == 8_030_261_248
    assert num_parameters(preset("linear-llama3-1b", pattern="N", num_heads=32)) == 1_235_814_400


def test_the_1b_model_is_that_of_lasp_2() -> None:
    config = preset("linear-llama3-1b")
    assert (config.num_layers, config.dim, config.num_heads, config.size_of_head) == (16, 2048, 16, 128)
    assert config.layer_kinds.count("N") == 4


@pytest.mark.parametrize("name", PRESETS)
def test_every_fourth_layer_is_softmax_attention_if_nothing_else_is_said(name: str) -> None:
    config = preset(name)
    assert "".join(config.layer_kinds) == "LLLN" * (config.num_layers // 4)
    assert set(config.layer_operators) == {"simple_gla", "softmax"}


def test_the_tiny_model_is_that_of_the_main_job() -> None:
    assert ModelConfig().build(DataConfig().vocab_size) == preset("linear-llama3-tiny")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_may_have_any_mixer(name: str) -> None:
    for mixer in MIXERS:
        config = preset(name, pattern=(mixer,))
        assert set(config.layer_operators) == {mixer}
        assert config.dim == config.num_heads * config.size_of_head


def test_what_does_not_exist_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match=r"no preset 'linear-llama3-1B'. Did you mean 'linear-llama3-1b'\? There are linear-"
    ):
        preset("linear-llama3-1B")
    with pytest.raises(ConfigError, match=r"got 'mamb2'. Did you mean 'mamba2'\?"):
        preset("linear-llama3-tiny", operator="mamb2")
