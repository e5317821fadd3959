"""The config: that of the library under the names of both, refused where it is none."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import transformers

from longspan.errors import CheckpointError, ConfigError
from longspan.models import LinearLlama3Config
from longspan.models.hf import LinearLlamaConfig


def test_it_holds_what_the_model_is_told_and_gives_it_back() -> None:
    core = LinearLlama3Config(
        77, dim=24, num_layers=3, pattern="LNL", operator=("gla", "kda"), num_heads=3, window=4, tie_embeddings=True
    )
    config = LinearLlamaConfig.of(core, max_position_embeddings=99)
    assert config.core() == core
    assert (config.hidden_size, config.num_hidden_layers, config.tie_word_embeddings) == (24, 3, True)
    assert LinearLlamaConfig(**json.loads(config.to_json_string())).core() == core


def test_the_names_of_transformers_are_taken_too() -> None:
    config = LinearLlamaConfig(vocab_size=50, hidden_size=24, num_attention_heads=3, intermediate_size=8)
    assert config.core() == LinearLlama3Config(50, dim=24, num_heads=3, hidden_dim=8)
    with pytest.raises(ConfigError, match="dim is given twice, as hidden_size too"):
        LinearLlamaConfig(dim=24, hidden_size=24)


def test_a_scaled_rotary_embedding_is_taken_as_transformers_says_it() -> None:
    wanted = LinearLlama3Config(
        50,
        rope_theta=1e4,
        rope_factor=32.0,
        rope_low_freq_factor=2.0,
        rope_high_freq_factor=8.0,
        rope_original_length=64,
    )
    said = {"factor": 32, "low_freq_factor": 2, "high_freq_factor": 8, "original_max_position_embeddings": 64}
    for given in (
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 10_000, **said}},
        {"rope_theta": 10_000.0, "rope_scaling": {"type": "llama3", **said}},
    ):
        config = LinearLlamaConfig(vocab_size=50, **given)
        assert config.core() == wanted
        assert LinearLlamaConfig(**json.loads(config.to_json_string())).core() == wanted
    assert LinearLlamaConfig(vocab_size=50, rope_parameters=None).core() == LinearLlama3Config(50)
    with pytest.raises(ConfigError, match=r"the rotary embedding is scaled, 'yarn' \{'factor': 4.0\}"):
        LinearLlamaConfig(rope_scaling={"type": "yarn", "factor": 4.0})
    with pytest.raises(ConfigError, match="rope_theta is given twice, in rope_parameters too"):
        LinearLlamaConfig(rope_theta=5.0, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0})


def test_no_name_means_something_else_to_transformers() -> None:
    """Beside the vocabulary's size, which means the same."""
    ours = {entry.name for entry in dataclasses.fields(LinearLlama3Config)} - {"vocab_size"}
    theirs = {name for name in dir(transformers.PreTrainedConfig()) if not name.startswith("_")}
    theirs |= set(transformers.GenerationConfig._get_default_generation_params())
    assert not ours & theirs


def test_a_config_is_checked_when_it_is_made_and_when_it_is_used() -> None:
    with pytest.raises(ConfigError, match="pattern must be letters"):
        LinearLlamaConfig(pattern="LX")
    with pytest.raises(ConfigError, match="documents must be 'reset' or 'concatenate'; got 'no'"):
        LinearLlamaConfig(documents="no")
    config = LinearLlamaConfig()
    config.num_heads = 7
    with pytest.raises(ConfigError, match="dim 256 is not a multiple of num_heads 7"):
        config.core()


def test_it_is_saved_and_loaded_by_the_auto_class(tmp_path: Path) -> None:
    config = LinearLlamaConfig(dim=32, pattern="LLN", eos_token_id=3, documents="concatenate")
    config.save_pretrained(tmp_path)
    found = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(found) is LinearLlamaConfig
    assert found.core() == config.core() and (found.eos_token_id, found.documents) == (3, "concatenate")


def test_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    transformers.LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match="a model of the type 'llama', and LinearLlamaConfig is of 'linear_llama3'"
    ):
        LinearLlamaConfig.from_pretrained(tmp_path)
